"""Answers of a SOLO model to chats: one at a time as a stream, or in batches."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria, TextStreamer

from solo_vlm.data.values import check_text
from solo_vlm.generate.cache import (
    PrefixCache,
    drop_cached_images,
    has_full_attention,
    preallocated_cache,
    prompt_key,
    supports_prefix_cache,
)
from solo_vlm.generate.exactness import cache_fault, reads_padding
from solo_vlm.models.checks import check_processor
from solo_vlm.models.load import (
    Quantization,
    context_length,
    load_config,
    load_model,
    load_processor,
    quantization_config,
)
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.models.solo.modeling_solo import (
    SoloForConditionalGeneration,
    long_rope_lengths,
    takes_dynamic_cache,
)
from solo_vlm.models.solo.processing_solo import ChatTemplateError, Message, SoloProcessor
from solo_vlm.models.stops import check_stops, complete_generation, stop_ids
from solo_vlm.utils.errors import SoloError

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-4  # dividing logits by less would overflow
_SORT_WINDOW = 16  # batches sorted by length together; their images are in memory at the same time
_ROWS_PER_CHAT = ("num_beams", "num_return_sequences")  # options by which `generate` repeats a prompt
# Places in a row from which Llama 4 and Inkling scale scores by the place, which counts padding.
_PLACES_WITHOUT_SCALE = ("floor_scale", "log_scaling_n_floor")
_PREFETCH = 4  # batches encoded ahead of the model

T = TypeVar("T")


@dataclass(frozen=True)
class GenerationRequest:
    """One chat to answer.

    Attributes:
        request_id: Identifier chosen by the caller; the output repeats it.
        messages: Chat that ends with a user turn; image parts contain `PIL.Image`s.
        max_new_tokens: Maximum length of the answer.
    """

    request_id: int
    messages: list[Message]
    max_new_tokens: int


@dataclass(frozen=True)
class GenerationOutput:
    """Generated text with token counts and timings, or the reason why there is none.

    Values that a backend does not measure are None.

    Attributes:
        request_id: Identifier of the request.
        text: Answer without surrounding white space; None if the request failed.
        error: Reason for the failure.
        finish_reason: "stop" (an end token), "length", or "cancelled" (by the caller).
        prompt_tokens: Tokens of the prompt, image tokens included.
        cached_tokens: Prompt tokens found in the prefix cache.
        num_patches: Image patches in the prompt.
        completion_tokens: Generated tokens, the end token included.
        time_to_first_token: Seconds from the request to the first token.
        total_time: Seconds from the request to the last token.
    """

    request_id: int
    text: str | None
    error: str | None = None
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    num_patches: int | None = None
    completion_tokens: int | None = None
    time_to_first_token: float | None = None
    total_time: float | None = None


class ContextError(SoloError):
    """Chat that exceeds the model's context length."""


class GenerationPipeline:
    """Model and processor, ready to answer chats. Decoding is greedy unless a temperature is given.

    Args:
        model: Model in evaluation mode, on its device.
        processor: Processor the model was trained with.
        prefix_cache: Keys and values of earlier single chats, reused for prefixes that a new chat shares with
            them. Ignored, with a warning, for decoders whose past cannot be cut, such as recurrent ones.
        compile: Decode with a static cache, for which transformers compiles the decoding step on an
            accelerator (not on a CPU). The first answers take minutes. Excludes `prefix_cache`.
        in_training: Whether the model goes on training. FSDP keeps the memory that it gathers weights into,
            which must not consist of inference tensors.

    Raises:
        SoloError: Both `prefix_cache` and `compile` are given, the decoder has no static cache, or model and
            processor disagree about images.
    """

    def __init__(
        self,
        model: SoloForConditionalGeneration,
        processor: SoloProcessor,
        prefix_cache: PrefixCache | None = None,
        compile: bool = False,
        in_training: bool = False,
    ) -> None:
        if prefix_cache and compile:
            raise SoloError("compile and a prefix cache are incompatible: choose one")
        check_processor(model.config, processor)
        decoder = model.config.text_config
        if compile:
            fault = cache_fault(model, static=True) if _takes_dynamic_cache(model) else "it keeps a state"
            if fault:
                raise SoloError(
                    f"{decoder.model_type} does not work with a static cache ({fault}): leave out compile"
                )
        if prefix_cache and not supports_prefix_cache(decoder):
            logger.warning(
                "the prefix cache is off: %s keeps more of its past than keys and values, and cannot cut it",
                decoder.model_type,
            )
            prefix_cache = None
        complete_generation(model.generation_config, model.config, processor)
        self.model = model
        self.processor = processor
        self.prefix_cache = prefix_cache
        self.compile = compile
        self.in_training = in_training
        self._preallocate = has_full_attention(decoder)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str = "auto",
        device: str | None = None,
        quantize: Quantization | None = None,
        prefix_cache: PrefixCache | None = None,
        compile: bool = False,
    ) -> GenerationPipeline:
        """Load a model and its processor.

        Args:
            path: Model folder or hub ID, see `load_model`.
            dtype: "auto" (as stored) or the name of a torch dtype; with `quantize`, the compute dtype.
            device: Device name. Default: the accelerator if there is one.
            quantize: Format of quantized decoder weights, 8 or 4 bits; see `quantization_config`.
            prefix_cache, compile: See the class.

        Raises:
            SoloError: The path has no readable SOLO model, its settings would cut its answers short or let
                them never end, or the options are incompatible.
        """
        settings = None
        if quantize:
            compute_dtype = load_config(path).dtype if dtype == "auto" else getattr(torch, dtype)
            settings = quantization_config(quantize, compute_dtype or torch.float32)
        model, processor = load_model(path, dtype, device, settings), load_processor(path)
        check_stops(path, model.generation_config, processor)
        return cls(model, processor, prefix_cache, compile)

    def answer(self, chats: Sequence[list[Message]], max_new_tokens: int = 128) -> list[str]:
        """Answer several chats, in one batch if that does not change their answers."""
        inputs = self.encode(chats)
        if len(chats) > 1 and not self.may_batch(inputs["input_ids"].shape[1] + max_new_tokens):
            return [self.answer([chat], max_new_tokens)[0] for chat in chats]
        sequences, _ = self.generate(inputs, max_new_tokens)
        return self._texts(sequences, inputs)

    def stream(
        self,
        chat: list[Message],
        on_text: Callable[[str], None],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        should_stop: Callable[[], bool] | None = None,
    ) -> GenerationOutput:
        """Answer one chat and call `on_text` with each piece of text as soon as it is final.

        Args:
            chat: Messages that end with a user turn.
            on_text: Callback for text; leading white space is stripped.
            max_new_tokens: Maximum length of the answer, capped at the model's context length.
            temperature: Softmax temperature; 0 decodes greedily.
            top_p: Sample from the smallest set of tokens whose probabilities sum to this.
            should_stop: Called after each token; True ends the answer there.

        Raises:
            SoloError: See `encode`.
        """
        start = time.perf_counter()
        inputs = self.encode([chat])
        streamer = _TextCallback(self.processor.tokenizer, on_text)
        cancel = _Cancel(should_stop) if should_stop else None
        options: dict[str, Any] = {"streamer": streamer}
        if cancel:
            options["stopping_criteria"] = [cancel]
        if temperature:
            options |= {"do_sample": True, "temperature": max(temperature, MIN_TEMPERATURE), "top_p": top_p}
        sequences, cached_tokens = self.generate(inputs, max_new_tokens, **options)
        output = self.decode(sequences, inputs)[0]
        cancelled = cancel is not None and cancel.cancelled and output.finish_reason != "stop"
        return replace(
            output,
            finish_reason="cancelled" if cancelled else output.finish_reason,
            cached_tokens=cached_tokens,
            time_to_first_token=streamer.first_token_at and streamer.first_token_at - start,
            total_time=time.perf_counter() - start,
        )

    def encode(self, chats: Sequence[list[Message]]) -> Any:
        """Return the inputs for the next answer of each chat: left-padded, on the model's device.

        Raises:
            SoloError: The chat template rejects a chat, or an image cannot be read.
            ContextError: A chat exceeds the model's context length.
        """
        self.processor.tokenizer.padding_side = "left"
        try:
            inputs = self.processor.apply_chat_template(
                list(chats), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except (ChatTemplateError, ImageError) as error:
            raise SoloError(str(error)) from error
        length = inputs["input_ids"].shape[1]
        if self.context_length and length >= self.context_length:
            raise ContextError(
                f"the chat has {length} tokens, but the model's context is {self.context_length}: shorten it"
            )
        return inputs.to(self.model.device)

    def join(self, encoded: Sequence[Any]) -> Any:
        """Return what `encode` returns for several chats, from its results for each of them."""
        ids = [inputs["input_ids"][0].tolist() for inputs in encoded]
        joined = self.processor.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt")
        vision = ("pixel_values", "image_grid_thw")
        parts = {name: [inputs[name] for inputs in encoded if name in inputs] for name in vision}
        return BatchFeature({**joined, **{name: torch.cat(part) for name, part in parts.items() if part}})

    def generate(self, inputs: Any, max_new_tokens: int, **options: Any) -> tuple[torch.Tensor, int]:
        """Generate token IDs; a single chat with a single answer goes through the prefix cache.

        Args:
            inputs: Result of `encode`.
            max_new_tokens: Maximum length of an answer, capped at the model's context length.
            **options: Options of `GenerationMixin.generate`: a streamer, stopping criteria, sampling.

        Returns:
            Prompts and answers, (chats, length) int64, and the number of prompt tokens found in the cache.

        Raises:
            SoloError: Answers would depend on the other chats of the batch, see `may_batch`.
        """
        with torch.inference_mode(not self.in_training):  # transformers computes no gradients either way
            return self._generate(inputs, max_new_tokens, **options)

    def _generate(self, inputs: Any, max_new_tokens: int, **options: Any) -> tuple[torch.Tensor, int]:
        options = {"do_sample": False, **options}
        rows, prompt_length = inputs["input_ids"].shape
        if self.context_length:
            max_new_tokens = min(max_new_tokens, self.context_length - prompt_length)
        length = prompt_length + max_new_tokens
        if rows > 1 and not self.may_batch(length):
            raise SoloError(f"answers of up to {length} tokens depend on their batch: generate one at a time")
        is_single = rows == 1 and all(options.get(name, 1) == 1 for name in _ROWS_PER_CHAT)
        if self.prefix_cache and is_single and length <= self._max_shared_length:
            prompt = prompt_key(inputs, self.model.config.image_token_id)
            cached, cache = self.prefix_cache.find(prompt)
            rest = drop_cached_images(inputs, prompt[:cached])
            sequences = self.model.generate(
                **rest, max_new_tokens=max_new_tokens, past_key_values=cache, **options
            )
            answer = sequences[0, len(prompt) :].cpu().numpy()
            self.prefix_cache.add(np.concatenate([prompt, answer]), cache)
            return sequences, cached
        reorders = options.get("num_beams", 1) > 1
        if not self.use_cache or (reorders and not _takes_dynamic_cache(self.model)):
            options["use_cache"] = False
        elif self.compile:
            options["cache_implementation"] = "static"
        elif self._preallocate:
            options["past_key_values"] = preallocated_cache()
        return self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options), 0

    def decode(self, sequences: torch.Tensor, inputs: Any) -> list[GenerationOutput]:
        """Return the answers that `generate` produced, with their token counts.

        Args:
            sequences: Prompts and answers, (chats, length) int64.
            inputs: Result of `encode`.
        """
        answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        num_patches = (inputs["input_ids"] == self.model.config.image_token_id).sum(1).tolist()
        ends = set(self.eos_token_ids)
        outputs = []
        for row, (text, ids) in enumerate(zip(self._texts(sequences, inputs), answers, strict=True)):
            length = next((count for count, token in enumerate(ids, 1) if token in ends), None)
            outputs.append(
                GenerationOutput(
                    row,
                    text,
                    finish_reason="stop" if length else "length",
                    prompt_tokens=prompt_tokens[row],
                    num_patches=num_patches[row],
                    completion_tokens=length or len(ids),
                )
            )
        return outputs

    def may_batch(self, length: int) -> bool:
        """Return whether answers do not depend on the other chats of a batch.

        Args:
            length: Tokens of the longest prompt and answer together.
        """
        return self.batches and length <= min(self._max_shared_length, self._max_padded_length)

    @property
    def _max_shared_length(self) -> int:
        """Length up to which the keys of a token do not depend on how long a sequence or a batch becomes."""
        return min(long_rope_lengths(self.model.config.text_config), default=sys.maxsize)

    @property
    def _max_padded_length(self) -> int:
        """Length up to which attention does not depend on the place of a token in its padded row."""
        scales = (getattr(self.model.config.text_config, name, None) for name in _PLACES_WITHOUT_SCALE)
        return min((places - 1 for places in scales if places), default=sys.maxsize)

    @cached_property
    def batches(self) -> bool:
        """Whether padding leaves answers unchanged. If not, chats are answered one at a time.

        Attention masks padding. Other layers may read it, so models with such layers are measured at their
        first batch.
        """
        if supports_prefix_cache(self.model.config.text_config):
            return True
        if harmful := reads_padding(self.model, self.use_cache):
            family = self.model.config.text_config.model_type
            logger.warning("chats are answered one at a time: padding would change the answers of %s", family)
        return not harmful

    @cached_property
    def use_cache(self) -> bool:
        """Whether the decoder's cache leaves answers unchanged. If not, every token is computed anew.

        Measured at the first use, if the decoder does not use a `DynamicCache`, which tests cover.
        """
        if _takes_dynamic_cache(self.model):
            return True
        if fault := cache_fault(self.model):
            family = self.model.config.text_config.model_type
            logger.warning("answers take long: the cache of %s does not work (%s)", family, fault)
        return fault is None

    @property
    def context_length(self) -> int | None:
        """Maximum length of prompt and answer together, or None if the configuration names none."""
        return context_length(self.model.config)

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Tokens that end an answer: the tokenizer's, the chat template's and the generation config's."""
        return stop_ids(self.model.generation_config)

    def _texts(self, sequences: torch.Tensor, inputs: Any) -> list[str]:
        new = sequences[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


class BatchGenerator:
    """Generator of answers in batches of similar length, which encodes ahead while the model works.

    Args:
        batch_size: Maximum number of chats per batch.
    """

    def __init__(self, pipeline: GenerationPipeline, batch_size: int = 8) -> None:
        self.pipeline = pipeline
        self.batch_size = batch_size if batch_size == 1 or pipeline.batches else 1

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[list[GenerationOutput]]:
        """Yield the outputs of one batch at a time, in any order.

        Args:
            requests: Consumed lazily, from another thread. An answer takes at most half of the context.
        """
        encoded = (item for batch in self._batches(iter(requests)) for item in self._encode(batch))
        for batch, inputs in _prefetch(encoded):
            if isinstance(inputs, SoloError):
                yield [GenerationOutput(request.request_id, None, str(inputs)) for request in batch]
                continue
            max_new_tokens = min(batch[0].max_new_tokens, (self.pipeline.context_length or 2**31) // 2)
            sequences, cached_tokens = self.pipeline.generate(inputs, max_new_tokens)
            outputs = self.pipeline.decode(sequences, inputs)
            yield [
                replace(output, request_id=request.request_id, cached_tokens=cached_tokens)
                for request, output in zip(batch, outputs, strict=True)
            ]

    def _batches(self, requests: Iterator[GenerationRequest]) -> Iterator[list[GenerationRequest]]:
        while window := list(islice(requests, _SORT_WINDOW * self.batch_size)):
            window.sort(key=lambda request: (request.max_new_tokens, self._length(request)), reverse=True)
            for _, group in groupby(window, key=lambda request: request.max_new_tokens):
                similar = list(group)
                for start in range(0, len(similar), self.batch_size):
                    yield similar[start : start + self.batch_size]

    def _length(self, request: GenerationRequest) -> int:
        """Estimate the number of prompt tokens without encoding anything."""
        parts = [part for message in request.messages for part in message["content"]]
        grid = self.pipeline.processor.image_processor.get_patch_grid
        images = [part["image"] for part in parts if part["type"] == "image"]
        patches = sum(rows * columns for rows, columns in (grid(i.height, i.width) for i in images))
        return patches + sum(len(part["text"]) for part in parts if part["type"] == "text") // 4

    def _encode(self, batch: list[GenerationRequest]) -> Iterator[tuple[list[GenerationRequest], Any]]:
        """Yield a batch with its inputs; if that fails, every chat alone, with its inputs or error."""
        try:
            inputs = self.pipeline.encode([request.messages for request in batch])
        except SoloError as error:
            if len(batch) == 1:
                yield batch, error
                return
        else:
            length = inputs["input_ids"].shape[1] + batch[0].max_new_tokens
            if len(batch) == 1 or self.pipeline.may_batch(length):
                yield batch, inputs
                return
        for request in batch:
            yield from self._encode([request])


def _takes_dynamic_cache(model: SoloForConditionalGeneration) -> bool:
    return takes_dynamic_cache(type(model.model.language_model))


def check_prompt(prompt: str) -> None:
    """Check that a tokenizer can read the prompt, before a model is loaded for it.

    Raises:
        SoloError: The prompt is not valid Unicode.
    """
    try:
        check_text(prompt)
    except ValueError as error:
        raise SoloError(f"the prompt cannot be used: {error}") from error


def user_turn(prompt: str, images: Sequence[Image.Image]) -> Message:
    """Return a user message: images first, then the prompt.

    Raises:
        SoloError: See `check_prompt`.
    """
    check_prompt(prompt)
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def open_images(sources: Sequence[str]) -> list[Image.Image]:
    """Open images from paths and URLs.

    Raises:
        SoloError: An image cannot be read; the message names it.
    """
    try:
        return [load_image(source) for source in sources]
    except ImageError as error:
        raise SoloError(str(error)) from error


def _prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the items while another thread prepares the next ones."""
    end: Any = object()
    with ThreadPoolExecutor(1) as executor:
        pending = deque(executor.submit(next, items, end) for _ in range(_PREFETCH))
        while (item := pending.popleft().result()) is not end:
            pending.append(executor.submit(next, items, end))
            yield item


class _TextCallback(TextStreamer):
    """Streamer that passes text without leading white space to a callback, and times the first token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first_token_at: float | None = None
        self._on_text = on_text
        self._started = False

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._started:
            text = text.lstrip()
        if text:
            self._started = True
            self._on_text(text)


class _Cancel(StoppingCriteria):
    """Stopping criterion that ends all answers as soon as the callback returns True."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self.cancelled = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.cancelled = self._should_stop()
        return torch.full((len(input_ids),), self.cancelled, device=input_ids.device)
