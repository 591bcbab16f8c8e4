"""Exact-match accuracy of generated answers to held-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from solo_vlm.data.sample import Sample, SampleError, parse_sample
from solo_vlm.data.sources import Source, open_source
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.solo.image_loading_solo import load_image
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.utils.errors import SoloError

_BATCH_SIZE = 50
_MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class HeldOutQuestion:
    """A chat whose last turn, the assistant's, is the reference."""

    sample: Sample

    @property
    def chat(self) -> list[Message]:
        """Turns up to the question, with their images."""
        images = map(load_image, self.sample.images)
        return [
            {
                **message,
                "content": [
                    {"type": "image", "image": next(images)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in self.sample.messages[:-1]
        ]

    @property
    def image(self) -> Image.Image:
        """First image of the chat."""
        return load_image(self.sample.images[0])

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return text_of(self.sample.messages[-2])

    @property
    def reference(self) -> str:
        """Text of the last assistant turn."""
        return text_of(self.sample.messages[-1])


@dataclass(frozen=True)
class HeldOutAnswer(HeldOutQuestion):
    """A question with the model's answer."""

    answer: str  # greedy, at most 40 tokens

    @property
    def correct(self) -> bool:
        """Whether the answer equals the reference up to case and white space."""
        return " ".join(self.answer.lower().split()) == " ".join(self.reference.lower().split())


def read_questions(path: str | Path) -> list[HeldOutQuestion]:
    """Read all samples of a file or folder; images are opened on access.

    Raises:
        SoloError: There is no data, or a sample does not end with a question and its answer.
    """
    source = open_source(path)
    return [
        _question(source, unit, number, row)
        for unit in range(len(source))
        for number, row in enumerate(source.read(unit))
    ]


def answer_questions(
    questions: Sequence[HeldOutQuestion], pipeline: GenerationPipeline
) -> Iterator[list[HeldOutAnswer]]:
    """Yield a model's answers in order, in batches."""
    for start in range(0, len(questions), _BATCH_SIZE):
        batch = questions[start : start + _BATCH_SIZE]
        texts = pipeline.answer([question.chat for question in batch], _MAX_NEW_TOKENS)
        yield [HeldOutAnswer(question.sample, text) for question, text in zip(batch, texts, strict=True)]


def accuracy(answers: Sequence[HeldOutAnswer]) -> float:
    """Return the fraction of correct answers."""
    return sum(answer.correct for answer in answers) / len(answers)


def _question(source: Source, shard: int, number: int, row: dict[str, Any]) -> HeldOutQuestion:
    try:
        sample = parse_sample(row)
    except SampleError as error:
        raise SoloError(f"{source.where(shard, number)}: {error}") from error
    if [message["role"] for message in sample.messages[-2:]] != ["user", "assistant"]:
        raise SoloError(
            f"{source.where(shard, number)}: the chat does not end with a question and its answer"
        )
    return HeldOutQuestion(sample)


def text_of(message: Message) -> str:
    """Return the text of a turn without its images."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")
