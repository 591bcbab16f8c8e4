"""Answers to many questions: batches of similar length, prepared while the model works."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, TypeVar

from solo_vlm.generate.answerer import Answerer
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.utils.errors import SoloError

_WINDOW = 16  # batches that are sorted by length together; their images are in memory at the same time
_AHEAD = 4  # batches that are encoded before they are needed

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One thing to ask a model.

    Attributes:
        number: the caller's, to know the answer by.
        chat: ends with the user's turn; images are `PIL.Image`s in its parts.
        max_new_tokens: longest answer.
    """

    number: int
    chat: list[Message]
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        number: of the question.
        text: the answer; None where there is none.
        error: why there is none.
    """

    number: int
    text: str | None
    error: str | None = None


class ModelEngine:
    """A model in this process: batches of similar length; images are read ahead while the model works.

    Args:
        answerer: the model with its processor.
        batch_size: chats that are answered at once.
    """

    def __init__(self, answerer: Answerer, batch_size: int = 8) -> None:
        self.answerer = answerer
        self.batch_size = batch_size

    def answer(self, questions: Iterable[Question]) -> Iterator[list[Answer]]:
        """Yield answers as they come, a batch at a time.

        Args:
            questions: asked for little by little, from another thread. An answer takes at most half of the
                model's context.
        """
        encoded = (item for batch in self._batches(iter(questions)) for item in self._encode(batch))
        for batch, inputs in _read_ahead(encoded):
            if isinstance(inputs, SoloError):
                yield [Answer(question.number, None, str(inputs)) for question in batch]
                continue
            longest = min(batch[0].max_new_tokens, (self.answerer.context or 2**31) // 2)
            texts = self.answerer.answer_encoded(inputs, longest)
            yield [Answer(question.number, text) for question, text in zip(batch, texts, strict=True)]

    def _batches(self, questions: Iterator[Question]) -> Iterator[list[Question]]:
        while window := list(islice(questions, _WINDOW * self.batch_size)):
            window.sort(key=lambda question: (question.max_new_tokens, self._length(question)), reverse=True)
            for _, group in groupby(window, key=lambda question: question.max_new_tokens):
                alike = list(group)
                for start in range(0, len(alike), self.batch_size):
                    yield alike[start : start + self.batch_size]

    def _length(self, question: Question) -> int:
        """About as many tokens, without encoding anything."""
        grid = self.answerer.processor.image_processor.get_patch_grid
        images, text = _images(question.chat), _text(question.chat)
        return (
            sum(rows * columns for rows, columns in (grid(i.height, i.width) for i in images))
            + len(text) // 4
        )

    def _encode(self, batch: list[Question]) -> Iterator[tuple[list[Question], Any]]:
        """Model inputs of a batch. If a chat cannot be encoded, each goes alone, that one as its error."""
        try:
            inputs = self.answerer.encode([question.chat for question in batch])
        except SoloError as error:
            if len(batch) == 1:
                yield batch, error
            else:
                for question in batch:
                    yield from self._encode([question])
        else:
            yield batch, inputs


def _read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, prepared by another thread while earlier ones are in use."""
    nothing: Any = object()
    with ThreadPoolExecutor(1) as executor:
        coming = deque(executor.submit(next, items, nothing) for _ in range(_AHEAD))
        while (item := coming.popleft().result()) is not nothing:
            coming.append(executor.submit(next, items, nothing))
            yield item


def _parts(chat: Sequence[Message]) -> Iterator[dict[str, Any]]:
    return (part for message in chat for part in message["content"])


def _images(chat: Sequence[Message]) -> list[Any]:
    return [part["image"] for part in _parts(chat) if part["type"] == "image"]


def _text(chat: Sequence[Message]) -> str:
    return "".join(part["text"] for part in _parts(chat) if part["type"] == "text")
