"""Batched generation for concurrent requests: queue, batches, sampling and streamed text."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper

from solo_vlm.generate import GenerationPipeline
from solo_vlm.generate.pipeline import MIN_TEMPERATURE
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.serve.images import EncodedImage

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]
Result = TypeVar("Result")

INCOMPLETE = "\ufffd"  # what the first bytes of a multi-byte character decode to


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping of one request.

    Attributes:
        max_tokens: Maximum number of generated tokens.
        temperature: 0 selects greedy decoding.
        top_p: Sample from the smallest set of tokens with at least this total probability.
        seed: Seed of the sampling; None draws one.
        stop: Strings that end the answer and are not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A tokenized chat with its encoded images.

    Attributes:
        input_ids: (length,) int64, images expanded to their layout.
        supervised: (length,) bool, text of the assistant and the token that ends its turn.
        images: Encoded images in order of appearance.
    """

    input_ids: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    images: tuple[EncodedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Finish:
    """End of an answer: why it ended, and its token counts.

    Attributes:
        reason: "stop" (end token or stop string) or "length".
        completion_tokens: Generated tokens.
        cached_tokens: Prompt tokens found in the prefix cache.
    """

    reason: FinishReason
    completion_tokens: int
    cached_tokens: int = 0


class Request:
    """A prompt to answer, created in the event loop that reads the answer.

    Attributes:
        cancelled: Whether the client has disconnected. Set by the engine.
    """

    def __init__(self, prompt: Prompt, params: SamplingParams) -> None:
        self.prompt = prompt
        self.params = params
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Finish | Exception] = asyncio.Queue()

    def put(self, event: str | Finish | Exception) -> None:
        """Hand text, the finish, or an error to the reader. Called from the engine's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[str | Finish]:
        """Yield the text pieces of the answer, then its finish; raise the error of a failed generation."""
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Finish):
                return


class Call(Generic[Result]):
    """A function that needs the model, and the future of its result."""

    def __init__(self, function: Callable[[GenerationPipeline], Result]) -> None:
        self.future: Future[Result] = Future()
        self._function = function

    def __call__(self, pipeline: GenerationPipeline) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self._function(pipeline))
            except Exception as error:
                self.future.set_exception(error)


class Engine:
    """One thread that owns the model and serves queued requests in order of arrival, in batches.

    Args:
        pipeline: Pipeline whose model and tokenizer only the engine uses; its image processor may be shared.
        max_batch: Maximum requests per batch; 1 if padding would change the model's answers.
        max_batch_tokens: Maximum rows * (longest prompt + longest answer) per batch of several requests.
    """

    def __init__(self, pipeline: GenerationPipeline, max_batch: int, max_batch_tokens: int) -> None:
        self.pipeline = pipeline
        self._max_batch = max_batch if max_batch == 1 or pipeline.batches else 1
        self._max_batch_tokens = max_batch_tokens
        self._running: Sequence[Request | Call[Any]] = ()
        self._queue: deque[Request | Call[Any]] = deque()
        self._changed = Condition()
        self._closed = False
        # A fast tokenizer mutates its own state while encoding, so every thread needs a lock or a copy.
        self._encoding = Lock()
        self._tokenizer = copy.deepcopy(pipeline.processor.tokenizer)
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Number of requests in the current batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return len(self._queue)

    def encode(
        self, messages: Sequence[Message], images: Sequence[EncodedImage], add_generation_prompt: bool = True
    ) -> Prompt:
        """Tokenize a chat. Thread-safe.

        Args:
            messages: Chat with one image part per image, in the order of `images`.
            add_generation_prompt: Whether to end where the next answer begins.

        Raises:
            ChatTemplateError: The chat template rejects the chat.
        """
        grids = [image.image_grid_thw for image in images]
        with self._encoding:
            chat = self.pipeline.processor.encode_chat(messages, grids, add_generation_prompt)
        return Prompt(chat.input_ids, chat.supervised, tuple(images))

    def submit(self, item: Request | Call[Any]) -> None:
        """Queue a request, or a call, which runs alone between two batches."""
        with self._changed:
            self._queue.append(item)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Drop an unfinished request: at once if it is queued, at its next token if it is running."""
        with self._changed:
            request.cancelled = True
            if request in self._queue:
                self._queue.remove(request)

    def close(self) -> None:
        """Drop all requests and stop the thread."""
        with self._changed:
            self._closed = True
            for item in (*self._running, *self._queue):
                if isinstance(item, Request):
                    item.cancelled = True
                else:
                    item.future.cancel()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed:
            batch = self._next_batch()
            if isinstance(batch, Call):
                batch(self.pipeline)
            elif batch:
                try:
                    generate_batch(self.pipeline, self._tokenizer, batch)
                except Exception as error:
                    logger.exception("generation failed for a batch of %d requests", len(batch))
                    for request in batch:
                        request.put(error)
            self._running = ()

    def _next_batch(self) -> list[Request] | Call[Any]:
        """Wait for work; return a call, or as many requests as fit together (none once closed)."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            batch: list[Request] = []
            while self._queue and not self._closed:
                item = self._queue[0]
                if isinstance(item, Call):
                    if batch:
                        break
                    self._running = (self._queue.popleft(),)
                    return item
                if not self._fits([*batch, item]):
                    break
                self._queue.popleft()
                batch.append(item)
            self._running = batch
            return batch

    def _fits(self, batch: list[Request]) -> bool:
        """Return whether requests fit in one batch: each row is padded to the longest prompt and answer."""
        if len(batch) == 1:
            return True
        length = max(len(r.prompt) for r in batch) + max(r.params.max_tokens for r in batch)
        small = len(batch) <= self._max_batch and len(batch) * length <= self._max_batch_tokens
        fits = length <= (self.pipeline.context_length or length)
        return small and fits and self.pipeline.may_batch(length)


# ---------------------------------------------------------------------------------------- one batch


def generate_batch(pipeline: GenerationPipeline, tokenizer: Any, requests: Sequence[Request]) -> None:
    """Generate the answers of one batch; send each request its text pieces and its finish.

    Args:
        tokenizer: Tokenizer for decoding; no other thread may use it.
        requests: Requests whose longest prompt plus longest answer fit the model's context.
    """
    # The size of a cached prefix is known when generation returns: a request that runs alone waits for it.
    alone = len(requests) == 1
    outputs = [_Output(request, tokenizer, pipeline.eos_token_ids, hold_finish=alone) for request in requests]
    inputs = merge_prompts([request.prompt for request in requests], tokenizer.pad_token_id)
    _, cached_tokens = pipeline.generate(
        {name: value.to(pipeline.model.device) for name, value in inputs.items()},
        max(request.params.max_tokens for request in requests),
        logits_processor=[RowSampler([request.params for request in requests], pipeline.model.device)],
        stopping_criteria=[_OutputListener(outputs)],
    )
    if alone:
        outputs[0].send_finish(cached_tokens)


def merge_prompts(prompts: Sequence[Prompt], pad_id: int) -> dict[str, Tensor]:
    """Return the model inputs of a batch of prompts, padded on the left."""
    ids = [torch.from_numpy(prompt.input_ids) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")  # returns (prompts, longest)
    masks = [torch.ones_like(row) for row in ids]
    inputs = {"input_ids": pad(ids, padding_value=pad_id), "attention_mask": pad(masks)}
    if images := [image for prompt in prompts for image in prompt.images]:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([image.pixel_values for image in images]))
        inputs["image_grid_thw"] = torch.from_numpy(np.stack([image.image_grid_thw for image in images]))
    return inputs


class _Output:
    """Answer in progress to one request."""

    def __init__(
        self, request: Request, tokenizer: Any, eos_token_ids: Sequence[int], hold_finish: bool = False
    ) -> None:
        self.done = False
        self._request = request
        self._eos_token_ids = eos_token_ids
        self._hold_finish = hold_finish
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.params.stop)
        self._tokens = 0
        self._reason: FinishReason | None = None

    def append(self, token: int) -> bool:
        """Append the next token; return whether the answer is complete."""
        if self.done:
            return True
        self._tokens += 1
        if self._request.cancelled:
            self.done = True
        elif token in self._eos_token_ids:
            self._finish("stop")
        else:
            self._send(self._detokenizer.append(token))
            if self._detokenizer.stopped:
                self._finish("stop")
            elif self._tokens == self._request.params.max_tokens:
                self._finish("length")
        return self.done

    def send_finish(self, cached_tokens: int = 0) -> None:
        """Send the finish, unless the request was cancelled before."""
        if self._reason:
            self._request.put(Finish(self._reason, self._tokens, cached_tokens))

    def _finish(self, reason: FinishReason) -> None:
        self.done = True
        self._send(self._detokenizer.flush())
        # The flushed text may complete a stop string.
        self._reason = "stop" if self._detokenizer.stopped else reason
        if not self._hold_finish:
            self.send_finish()

    def _send(self, text: str) -> None:
        if text:
            self._request.put(text)


class _OutputListener(StoppingCriteria):
    """Stopping criterion that passes each new token to its output and reports which rows are done."""

    def __init__(self, outputs: Sequence[_Output]) -> None:
        self._outputs = outputs

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        newest = input_ids[:, -1].tolist()
        done = [output.append(token) for output, token in zip(self._outputs, newest, strict=True)]
        return torch.tensor(done, device=input_ids.device)  # (rows,)


class RowSampler(LogitsProcessor):
    """Logits processor that samples each row with its own parameters, under greedy search.

    The argmax of logits plus Gumbel noise is a sample of their softmax (Gumbel 1954). Each row draws its
    noise from its own generator, so a seed gives the same answer regardless of the rest of the batch.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        self._rows = [
            (row, own.temperature, _generator(own.seed, device), TopPLogitsWarper(own.top_p))
            for row, own in enumerate(params)
            if own.temperature
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # both (rows, vocabulary)
        for row, temperature, generator, top_p in self._rows:
            logits = top_p(input_ids[row], scores[row : row + 1] / max(temperature, MIN_TEMPERATURE))
            noise = torch.empty_like(logits).exponential_(generator=generator).log_()
            scores[row] = (logits - noise)[0]
        return scores


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class IncrementalDetokenizer:
    """Converter of streamed tokens into text that later tokens cannot change.

    The pieces concatenate to the decoded answer, stripped of surrounding white space, up to the first
    complete stop string. Leading white space is not part of the answer, so no stop string starts there.

    Args:
        tokenizer: Tokenizer for decoding; no other thread may use it.

    Attributes:
        stopped: Whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._held = max(map(len, stop), default=1) - 1  # characters that may begin a stop string
        self._ids: list[int] = []
        self._decoded = 0  # tokens whose text is final
        self._context = 0  # start of decoding: a few tokens earlier, to keep spaces between words
        self._pending = ""
        self._begun = False

    def append(self, token: int) -> str:
        """Return the text that one more token makes final; may be empty."""
        self._ids.append(token)
        return self._emit(self._decode(last=False), last=False)

    def flush(self) -> str:
        """Return the text held back, once there are no more tokens."""
        return "" if self.stopped else self._emit(self._decode(last=True), last=True)

    def _decode(self, last: bool) -> str:
        """Return the text of the tokens not yet decoded; empty while a character is incomplete."""
        known = self._text(self._ids[self._context : self._decoded])
        text = self._text(self._ids[self._context :])
        if len(text) <= len(known) or (text.endswith(INCOMPLETE) and not last):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return text[len(known) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _emit(self, text: str, last: bool) -> str:
        self._pending += text
        if not self._begun:
            self._pending = self._pending.lstrip()
        found = [(at + len(stop), at) for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:  # the first one to be complete, however many characters arrived at once
            self.stopped = last = True
            self._pending = self._pending[: min(found)[1]]
        final = len(self._pending) if last else len(self._pending) - self._held
        ready = self._pending[: max(final, 0)].rstrip()  # white space waits for the next word
        self._pending = self._pending[len(ready) :]
        self._begun = self._begun or bool(ready)
        return ready
