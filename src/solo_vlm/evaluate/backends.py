"""What answers an evaluation's questions: a model in this process, or one that is served elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from typing import TYPE_CHECKING, Any, Protocol

from solo_vlm.generate import GenerationOutput, GenerationRequest
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.pages import image_url

if TYPE_CHECKING:
    from solo_vlm.models.solo.processing_solo import Message


class Backend(Protocol):
    """Answers questions greedily, in an order of its own."""

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[list[GenerationOutput]]:
        """Yield answers as they come, some at a time.

        Args:
            requests: asked for little by little; maybe from another thread.

        Raises:
            SoloError: there is no going on, as opposed to a single question that has no answer.
        """


class ServerBackend:
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

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[list[GenerationOutput]]:
        """See `Backend`."""
        waiting: set[Future[GenerationOutput]] = set()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for question in requests:
                waiting.add(pool.submit(self._ask, question))
                if len(waiting) >= 2 * self.concurrency:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield [future.result() for future in done]
            for future in as_completed(waiting):
                yield [future.result()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, question: GenerationRequest) -> GenerationOutput:
        from openai import BadRequestError, OpenAIError, UnprocessableEntityError

        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=_with_data_urls(question.messages),
                max_tokens=question.max_new_tokens,
                temperature=0.0,
            )
        except (BadRequestError, UnprocessableEntityError) as error:  # this question: too long, for example
            return GenerationOutput(question.request_id, None, f"refused by the server: {error}")
        except OpenAIError as error:
            raise SoloError(f"no answer from {self._client.base_url}: {error}") from error
        return GenerationOutput(question.request_id, (reply.choices[0].message.content or "").strip())


def _with_data_urls(chat: Sequence[Message]) -> Any:
    """The chat as the API takes it."""

    def part_of_api(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        return {"type": "image_url", "image_url": {"url": image_url(part["image"])}}

    return [{**message, "content": [part_of_api(part) for part in message["content"]]} for message in chat]
