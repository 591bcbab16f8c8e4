"""Workload of the training step benchmark: captioned photographs, and models of two shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig

from solo_vlm import SoloConfig, SoloProcessor
from solo_vlm.data.encode import IGNORE_INDEX, Document, Encoder
from solo_vlm.data.sample import Sample
from solo_vlm.models.from_llm import SoloModelAndProcessor, compose
from solo_vlm.models.solo.processing_solo import num_image_tokens
from solo_vlm.quickstart.llm import train_tokenizer
from solo_vlm.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TINY_DECODER = {
    "vocab_size": 8192,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
TEXT = "a photograph of the old town by the river in early light with two people and their dog"
QUESTION = "two people and their dog by the river"
ROLES = ("image_token_id", "vision_start_token_id", "vision_row_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Workload:
    """Photographs whose long side is log-normal, and captions of evenly distributed lengths.

    Attributes:
        samples: Samples per step.
        rows: Samples per padded batch.
        length: Tokens of a packed sequence that is not made of those samples.
        median: Median long side in pixels; with the spread below, 7% have the largest size.
        largest: Maximum long side in pixels.
        spread: Standard deviation of the logarithm of the long side.
        caption: Minimum and maximum tokens of a caption.
        seed: Seed of sizes, pictures and captions.
        tiny: Whether to use tiny models, to test the benchmark itself.
    """

    samples: int
    rows: int = 8
    length: int = 32_768
    median: int = 500
    largest: int = 1024
    spread: float = 0.5
    caption: tuple[int, int] = (20, 60)
    seed: int = 0
    tiny: bool = False

    @classmethod
    def of_tiny(cls) -> Workload:
        return cls(samples=6, rows=3, length=2048, median=100, largest=200, caption=(3, 9), tiny=True)

    def draw(self) -> tuple[list[Image.Image], list[Document]]:
        """Return the photographs, and the samples encoded for training."""
        rng = np.random.default_rng(self.seed)
        images = [photograph(*size) for size in self.sizes(rng, self.samples)]
        return images, [document(image, self.words(rng)) for image in images]

    def sequence(self) -> list[Document]:
        """Return documents of exactly `length` tokens: photographs with captions, and a final text."""
        rng = np.random.default_rng(self.seed)
        documents: list[Document] = []
        room = self.length
        while True:
            (size,) = self.sizes(rng, 1)
            following = document(photograph(*size), self.words(rng))
            if len(following) > room - 2:  # leaves room for an empty text
                return [*documents, document(None, room - 2)]
            documents.append(following)
            room -= len(following)

    def chats(self) -> Iterator[dict[str, Any]]:
        """Yield rows of training data: a question about a photograph, and its caption as the answer."""
        rng = np.random.default_rng(self.seed)
        for size in self.sizes(rng, self.samples):
            answer = [{"type": "text", "text": caption(self.words(rng))}]
            question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
            yield {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
                "images": [{"bytes": as_jpeg(photograph(*size))}],
            }

    def sizes(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Return (width, height) with aspect ratios of 3:4 and 4:3."""
        longs = self.median * np.exp(self.spread * rng.standard_normal(count))
        sides = [(round(long), round(0.75 * long)) for long in longs.clip(32, self.largest)]
        return [
            side if lying else side[::-1] for side, lying in zip(sides, rng.random(count) < 0.5, strict=True)
        ]

    def words(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.caption[0], self.caption[1] + 1))

    def config(self, shape: str, **decoder: Any) -> SoloConfig:
        """Return a configuration with the shape of a recipe's model and the vocabulary of these samples.

        Args:
            shape: Folder of `recipes/`.
            **decoder: Changes to the decoder's configuration.
        """
        settings = json.loads((RECIPES / shape / "config.json").read_text())
        settings["text_config"] |= (TINY_DECODER if self.tiny else {}) | decoder
        settings |= {role: getattr(_small().model.config, role) for role in ROLES}
        return SoloConfig(**settings)

    @property
    def processor(self) -> SoloProcessor:
        """Return the processor of these samples."""
        return _small().processor

    def recipe(self, **settings: Any) -> Recipe:
        """Return a recipe with one packed sequence per step, whose paths are never read."""
        data = {"sources": [{"path": "none"}], "sequence_length": self.length}
        return Recipe.parse({"model": "none", "out": "none", "global_batch": 1, "data": data, **settings})

    def of_many_batches(self, batches: int = 1000) -> dict[str, float]:
        """Return the mean number of tokens per image, and the share of padding in padded batches."""
        rng = np.random.default_rng(self.seed)
        processor = _small().processor.image_processor
        sizes = self.sizes(rng, batches * self.rows)
        images = [num_image_tokens(*processor.get_patch_grid(height, width)) for width, height in sizes]
        lengths = np.array([image + self.words(rng) + 2 for image in images])
        longest = lengths.reshape(-1, self.rows).max(axis=1)
        return {
            "tokens_per_image_of_many_batches": float(np.mean(images)),
            "padding_share_of_many_batches": float(1 - lengths.sum() / (self.rows * longest.sum())),
        }


def photograph(width: int, height: int) -> Image.Image:
    """Return one of scikit-learn's photographs (640 x 427), cropped and scaled."""
    original = _originals()[(width + height) % 2]
    scale = min(original.width / width, original.height / height)
    box = (0, 0, round(scale * width), round(scale * height))
    return original.resize((width, height), Image.Resampling.BILINEAR, box=box)


def document(image: Image.Image | None, words: int) -> Document:
    """Return an image with a text of `words` tokens, encoded as in training."""
    parts = [{"type": "text", "text": caption(words)}]
    if image is None:
        return Encoder(_small().processor)(Sample([{"role": "assistant", "content": parts}], []))
    content = [{"type": "image"}, *parts]
    return Encoder(_small().processor)(Sample([{"role": "assistant", "content": content}], [as_jpeg(image)]))


def caption(words: int) -> str:
    """Return a text of as many words, each of which is one token."""
    return " ".join(islice(cycle(TEXT.split()), words))


def as_jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def supervised_share(documents: Sequence[Document]) -> float:
    """Return the share of supervised tokens."""
    supervised = sum(int((document.labels != IGNORE_INDEX).sum()) for document in documents)
    return supervised / sum(map(len, documents))


@cache
def _originals() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@cache
def _small() -> SoloModelAndProcessor:
    """Return a processor with a tiny model, which has the IDs of the image tokens."""
    tokenizer = train_tokenizer([TEXT] * 2)
    llm = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_DECODER | {"vocab_size": len(tokenizer)}))
    return compose(llm, tokenizer)
