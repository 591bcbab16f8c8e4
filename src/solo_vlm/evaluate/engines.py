"""What answers an evaluation's questions: a model in this process, or one that is served elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from solo_vlm.errors import SoloError
from solo_vlm.html import image_url

if TYPE_CHECKING:
    from solo_vlm.generate import Answerer
    from solo_vlm.model.processing_solo import Message

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


class Engine(Protocol):
    """Answers questions greedily, in an order of its own."""

    def answer(self, questions: Iterable[Question]) -> Iterator[list[Answer]]:
        """Yield answers as they come, some at a time.

        Args:
            questions: asked for little by little; maybe from another thread.

        Raises:
            SoloError: there is no going on, as opposed to a single question that has no answer.
        """


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
        """See `Engine`. An answer takes at most half of the model's context."""
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


class ServedEngine:
    """A model behind an OpenAI-compatible API: `solo serve`, vLLM, or any other.

    Args:
        model: its name there.
        base_url: such as http://localhost:8000/v1; default: OPENAI_BASE_URL, or OpenAI's own.
        api_key: default: OPENAI_API_KEY; a server of one's own seldom asks for one.
        concurrency: requests under way at a time.
        retries: of a request that failed for a while.

    Raises:
        SoloError: the openai package is missing, or the key.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        retries: int = 5,
    ) -> None:
        try:
            from openai import OpenAI, OpenAIError
        except ImportError as error:
            raise SoloError("asking a served model needs a package more: pip install openai") from error
        self.model = model
        self.concurrency = concurrency
        try:
            self._client = OpenAI(base_url=base_url, api_key=api_key, max_retries=retries)
        except OpenAIError as error:
            raise SoloError("no key for the API: give --api-key, or set OPENAI_API_KEY") from error

    def answer(self, questions: Iterable[Question]) -> Iterator[list[Answer]]:
        """See `Engine`."""
        waiting: set[Future[Answer]] = set()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for question in questions:
                waiting.add(pool.submit(self._ask, question))
                if len(waiting) >= 2 * self.concurrency:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield [future.result() for future in done]
            for future in as_completed(waiting):
                yield [future.result()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, question: Question) -> Answer:
        from openai import BadRequestError, OpenAIError, UnprocessableEntityError

        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=_with_data_urls(question.chat),
                max_tokens=question.max_new_tokens,
                temperature=0.0,
            )
        except (BadRequestError, UnprocessableEntityError) as error:  # this question: too long, for example
            return Answer(question.number, None, f"refused by the server: {error}")
        except OpenAIError as error:
            raise SoloError(f"no answer from {self._client.base_url}: {error}") from error
        return Answer(question.number, (reply.choices[0].message.content or "").strip())


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


def _with_data_urls(chat: Sequence[Message]) -> Any:
    """The chat as the API takes it."""

    def part_of_api(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        return {"type": "image_url", "image_url": {"url": image_url(part["image"])}}

    return [{**message, "content": [part_of_api(part) for part in message["content"]]} for message in chat]
