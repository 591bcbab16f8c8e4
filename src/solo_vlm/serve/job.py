"""A request on its way from the server's event loop to the thread that generates, and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen.

    Attributes:
        max_tokens: longest answer.
        temperature: 0 for the likeliest answer.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: of the sampling; None for chance.
        stop: strings that end the answer; they do not belong to it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer: why, and how many tokens were generated."""

    reason: FinishReason
    answer_tokens: int


class Job:
    """A chat to answer, made in the event loop that will read the answer.

    Args:
        inputs: what `GenerationPipeline.encode` makes of the chat.
        sampling: how to answer it.

    Attributes:
        cancelled: nobody waits for the answer any more. Set by the engine.
    """

    def __init__(self, inputs: Any, sampling: Sampling) -> None:
        self.inputs = inputs
        self.sampling = sampling
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Finish | Exception] = asyncio.Queue()

    @property
    def prompt_tokens(self) -> int:
        """Of the chat, images included."""
        return self.inputs["input_ids"].shape[1]

    @property
    def patches(self) -> int:
        """Image tokens that carry pixels."""
        return len(self.inputs.get("pixel_values", ()))

    def put(self, event: str | Finish | Exception) -> None:
        """Hand a piece of the answer, its end, or what went wrong to the reader. For the engine's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[str | Finish]:
        """The pieces of the answer, then its end.

        Raises:
            Exception: whatever kept the engine from answering.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Finish):
                return
