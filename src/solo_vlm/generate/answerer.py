"""Answers of a SOLO model to chats, one at a time as a stream, or many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from transformers import StoppingCriteria, TextStreamer

from solo_vlm.generate.prefix_cache import (
    PrefixCache,
    can_reuse_prefixes,
    prompt_tokens,
    without_known_images,
)
from solo_vlm.generate.roomy_cache import has_full_attention, roomy_cache
from solo_vlm.models.load import load_config, load_model, load_processor
from solo_vlm.models.quantization import Quantization, quantization_config
from solo_vlm.models.saving import stop_ids
from solo_vlm.models.solo.image_loading_solo import ImageError
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.models.solo.processing_solo import ChatTemplateError, Message, SoloProcessor
from solo_vlm.utils.errors import SoloError

LOWEST_TEMPERATURE = 1e-4  # below, logits divided by it would be infinite


class Reply(TypedDict):
    """An answer, and what it took.

    Attributes:
        answer: the text, without white space around it.
        prompt_tokens: of the chat, images included.
        cached_tokens: how many of these were in the prefix cache.
        num_patches: image patches in the chat.
        answer_tokens: generated ones.
        finish: "stop" (the model ended the answer), "length", or "stopped" (the caller did).
    """

    answer: str
    prompt_tokens: int
    cached_tokens: int
    num_patches: int
    answer_tokens: int
    finish: Literal["stop", "length", "stopped"]


class ContextError(SoloError):
    """A chat that is longer than the model's context."""


class Answerer:
    """A model with its processor, ready to be asked. Answers are greedy unless a temperature is given.

    Args:
        model: in evaluation mode, on its device.
        processor: the one it was trained with.
        prefix_cache: keeps what was computed for chats that were answered alone, so that what a later one
            has in common with them is not computed again. Decoders with recurrent layers go without.
        compile: generate with a cache of fixed size, for which transformers compiles the decoding step on an
            accelerator (not on a CPU). The first answers take minutes. It excludes a prefix cache.

    Raises:
        SoloError: both `prefix_cache` and `compile`.
    """

    def __init__(
        self,
        model: SoloForConditionalGeneration,
        processor: SoloProcessor,
        prefix_cache: PrefixCache | None = None,
        compile: bool = False,
    ) -> None:
        if prefix_cache and compile:
            raise SoloError("a compiled model cannot reuse prompts: choose one of prefix cache and compile")
        model.generation_config.eos_token_id = stop_ids(model.generation_config, processor)
        self.model = model
        self.processor = processor
        self.prefix_cache = prefix_cache if can_reuse_prefixes(model.config.text_config) else None
        self.compile = compile
        self._make_cache = roomy_cache if has_full_attention(model.config.text_config) else None

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str = "auto",
        device: str | None = None,
        quantize: Quantization | None = None,
        prefix_cache: PrefixCache | None = None,
        compile: bool = False,
    ) -> Answerer:
        """From a folder or hub id.

        Args:
            path: see `load_model`, as for `dtype` and `device`.
            dtype: "auto" or a torch dtype's name; with `quantize` it is what is computed in.
            device: default: the accelerator if there is one.
            quantize: hold the decoder's weights in 8 or 4 bits, see `quantization_config`.
            prefix_cache: see `Answerer`.
            compile: see `Answerer`.

        Raises:
            SoloError: nothing readable is there, or what was asked for does not go together.
        """
        settings = None
        if quantize:
            computed_in = load_config(path).dtype if dtype == "auto" else getattr(torch, dtype)
            settings = quantization_config(quantize, computed_in or torch.float32)
        return cls(load_model(path, dtype, device, settings), load_processor(path), prefix_cache, compile)

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
        top_p: float = 1.0,
        should_stop: Callable[[], bool] | None = None,
    ) -> Reply:
        """Answer one chat; call `on_text` with each piece of text as soon as it is certain.

        Args:
            chat: ends with the user's turn.
            on_text: gets the text without white space before the first word.
            max_new_tokens: longest answer; it never goes beyond the model's context.
            temperature: 0 for the likeliest answer.
            top_p: sample among the likeliest tokens that together have this probability.
            should_stop: asked after each token; the answer then ends there.

        Raises:
            SoloError: see `encode`.
        """
        return self.stream_encoded(
            self.encode([chat]), on_text, max_new_tokens, temperature, top_p, should_stop
        )

    def stream_encoded(
        self,
        inputs: Any,
        on_text: Callable[[str], None],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        should_stop: Callable[[], bool] | None = None,
    ) -> Reply:
        """As `stream`, for one chat that `encode` has seen already."""
        prompt = inputs["input_ids"].shape[1]
        stop = _Stop(should_stop) if should_stop else None
        options: dict[str, Any] = {"streamer": _Callback(self.processor.tokenizer, on_text)}
        if stop:
            options["stopping_criteria"] = [stop]
        if temperature:
            options |= {
                "do_sample": True,
                "temperature": max(temperature, LOWEST_TEMPERATURE),
                "top_p": top_p,
            }
        output, cached = self.generate(inputs, max_new_tokens, **options)
        ended = int(output[0, -1]) in self.end_ids
        return {
            "answer": self._decode(output, inputs)[0],
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "num_patches": len(inputs.get("pixel_values", ())),
            "answer_tokens": output.shape[1] - prompt,
            "finish": "stop" if ended else "stopped" if stop and stop.stopped else "length",
        }

    def generate(self, inputs: Any, max_new_tokens: int, **options: Any) -> tuple[torch.Tensor, int]:
        """Generate with transformers' own options; a single chat goes by way of the prefix cache.

        Args:
            inputs: what `encode` returns.
            max_new_tokens: longest answer; no chat goes beyond the model's context.
            **options: of `GenerationMixin.generate`, such as a streamer, stopping criteria or sampling.

        Returns:
            Prompts and answers, (chats, length) int64, and how many tokens of the prompt were in the cache.
        """
        if self.prefix_cache and len(inputs["input_ids"]) == 1:
            return self._generate_after_prefix(self.prefix_cache, inputs, max_new_tokens, **options)
        return self._generate(inputs, max_new_tokens, **options), 0

    def encode(self, chats: Sequence[list[Message]]) -> Any:
        """Model inputs for the next answer of each chat, on the model's device.

        Raises:
            SoloError: a chat that the template refuses; `ContextError` if it is longer than the context.
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
            raise ContextError(
                f"the chat has {length} tokens, the model's context {self.context}: shorten it"
            )
        return inputs.to(self.model.device)

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, prompt and answer together, where its configuration tells."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    @property
    def end_ids(self) -> Sequence[int]:
        """Tokens that end an answer: the tokenizer's, the chat template's and the generation config's."""
        return stop_ids(self.model.generation_config)

    @torch.inference_mode()
    def _generate_after_prefix(
        self, prefix_cache: PrefixCache, inputs: Any, max_new_tokens: int, **options: Any
    ) -> tuple[torch.Tensor, int]:
        """What `_generate` returns, and how many tokens of the prompt were known."""
        prompt = prompt_tokens(inputs, self.model.config.image_token_id)
        known, cache = prefix_cache.find(prompt)
        rest = without_known_images(inputs, prompt[:known])
        output = self._generate(rest, max_new_tokens, past_key_values=cache, **options)
        answer = output[0, len(prompt) :].cpu().numpy()
        prefix_cache.add(np.concatenate([prompt, answer]), cache)
        return output, known

    @torch.inference_mode()
    def _generate(self, inputs: Any, max_new_tokens: int, **options: Any) -> torch.Tensor:
        """Prompts and answers, (chats, length) int64."""
        options = {"do_sample": False, **self._cache(), **options}
        if self.context:
            max_new_tokens = min(max_new_tokens, self.context - inputs["input_ids"].shape[1])
        return self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)

    def _cache(self) -> dict[str, Any]:
        """The option of `GenerationMixin.generate` that says where keys and values are kept."""
        if self.compile:
            return {"cache_implementation": "static"}
        return {"past_key_values": self._make_cache()} if self._make_cache else {}

    def _decode(self, output: torch.Tensor, inputs: Any) -> list[str]:
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


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


class _Stop(StoppingCriteria):
    """Ends all answers as soon as the caller wants it."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.stopped = self._should_stop()
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)
