"""Answers of a SOLO model to chats, one at a time as a stream, or many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from solo_vlm.errors import SoloError
from solo_vlm.model.image_loading_solo import ImageError, load_image
from solo_vlm.model.load import load_model, load_processor
from solo_vlm.model.modeling_solo import SoloForConditionalGeneration
from solo_vlm.model.processing_solo import ChatTemplateError, Message, SoloProcessor


class Answerer:
    """A model with its processor, ready to be asked. Answers are greedy unless a temperature is given.

    Args:
        model: in evaluation mode, on its device.
        processor: the one it was trained with.
    """

    def __init__(self, model: SoloForConditionalGeneration, processor: SoloProcessor) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, path: str | Path, dtype: str = "auto", device: str | None = None) -> Answerer:
        """From a folder or hub id.

        Raises:
            SoloError: nothing readable is there.
        """
        return cls(load_model(path, dtype, device), load_processor(path))

    def answer(self, chats: Sequence[list[Message]], max_new_tokens: int = 128) -> list[str]:
        """Answer several chats in one batch (left padding); an answer does not depend on its neighbours."""
        return self.answer_encoded(self.encode(chats), max_new_tokens)

    def answer_encoded(self, inputs: Any, max_new_tokens: int = 128) -> list[str]:
        """As `answer`, for chats that `encode` has seen already, perhaps in another thread."""
        return self._decode(self._generate(inputs, max_new_tokens), inputs)

    def stream(
        self,
        chat: list[Message],
        on_text: Callable[[str], None],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> dict[str, Any]:
        """Answer one chat; call `on_text` with each piece of text as soon as it is certain.

        Returns:
            `answer` and the numbers of `prompt_tokens`, `image_tokens` (patches) and `answer_tokens`.
        """
        inputs = self.encode([chat])
        streamer = _Callback(self.processor.tokenizer, on_text)
        output = self._generate(inputs, max_new_tokens, temperature, streamer)
        prompt_tokens = inputs["input_ids"].shape[1]
        return {
            "answer": self._decode(output, inputs)[0],
            "prompt_tokens": prompt_tokens,
            "image_tokens": len(inputs.get("pixel_values", ())),
            "answer_tokens": output.shape[1] - prompt_tokens,
        }

    def encode(self, chats: Sequence[list[Message]]) -> Any:
        """Model inputs for the next answer of each chat, on the model's device.

        Raises:
            SoloError: a chat that the template refuses, or longer than the model's context.
        """
        self.processor.tokenizer.padding_side = "left"
        try:
            inputs = self.processor.apply_chat_template(
                list(chats), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except (ChatTemplateError, ImageError) as error:
            raise SoloError(str(error)) from error
        length = inputs["input_ids"].shape[1]
        if self.context and length >= self.context:
            raise SoloError(f"the chat has {length} tokens, the model's context {self.context}: shorten it")
        return inputs.to(self.model.device)

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, prompt and answer together, where its configuration tells."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    @torch.inference_mode()
    def _generate(
        self, inputs: Any, max_new_tokens: int, temperature: float = 0.0, streamer: Any = None
    ) -> torch.Tensor:
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return self.model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)

    def _decode(self, output: torch.Tensor, inputs: Any) -> list[str]:
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def user_turn(prompt: str, images: Sequence[Image.Image]) -> Message:
    """A user's turn: images first, then the prompt."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def open_images(sources: Sequence[str]) -> list[Image.Image]:
    """Images from paths and URLs.

    Raises:
        SoloError: naming the one that cannot be read.
    """
    try:
        return [load_image(source) for source in sources]
    except ImageError as error:
        raise SoloError(str(error)) from error


class _Callback(TextStreamer):
    """Hands on each piece of text of a stream, without white space before the first."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._begun:
            text = text.lstrip()
        if text:
            self._begun = True
            self._on_text(text)
