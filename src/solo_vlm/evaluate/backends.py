"""Backends that answer an evaluation's questions: `generate.BatchGenerator`, or a model behind an API."""

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
    """Model or server that answers requests greedily, in any order, such as `BatchGenerator`."""

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[list[GenerationOutput]]:
        """Yield outputs in batches as they are ready; consume requests lazily, possibly from another thread.

        Raises:
            SoloError: The backend fails as a whole; the failure of a single request is its output's error.
        """


class ServerBackend:
    """Model behind an OpenAI-compatible API, such as `solo serve` or vLLM.

    Args:
        model: Name of the model on the server.
        base_url: URL such as http://localhost:8000/v1. Default: OPENAI_BASE_URL, or OpenAI's own.
        api_key: API key. Default: OPENAI_API_KEY.
        concurrency: Maximum in-flight requests.
        retries: Retries of a request after a transient failure.

    Raises:
        SoloError: The openai package or the key is missing.
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
            raise SoloError("a served model needs the openai package: pip install openai") from error
        self.model = model
        self.concurrency = concurrency
        try:
            self._client = OpenAI(base_url=base_url, api_key=api_key, max_retries=retries)
        except OpenAIError as error:
            raise SoloError("no key for the API: pass --api-key, or set OPENAI_API_KEY") from error

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[list[GenerationOutput]]:
        """Generate as specified by `Backend`."""
        pending: set[Future[GenerationOutput]] = set()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for request in requests:
                pending.add(pool.submit(self._complete, request))
                if len(pending) >= 2 * self.concurrency:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield [future.result() for future in done]
            for future in as_completed(pending):
                yield [future.result()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _complete(self, request: GenerationRequest) -> GenerationOutput:
        from openai import BadRequestError, OpenAIError, UnprocessableEntityError

        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=_with_data_urls(request.messages),
                max_tokens=request.max_new_tokens,
                temperature=0.0,
            )
        except (BadRequestError, UnprocessableEntityError) as error:  # this request only, e.g. too long
            return GenerationOutput(request.request_id, None, f"rejected by the server: {error}")
        except OpenAIError as error:
            raise SoloError(f"no answer from {self._client.base_url}: {error}") from error
        return GenerationOutput(request.request_id, (completion.choices[0].message.content or "").strip())


def _with_data_urls(messages: Sequence[Message]) -> Any:
    """Return the chat in the format of the API."""

    def api_part(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        return {"type": "image_url", "image_url": {"url": image_url(part["image"])}}

    return [{**message, "content": [api_part(part) for part in message["content"]]} for message in messages]
