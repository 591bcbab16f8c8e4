"""Backends that answer an evaluation's questions: `generate.BatchGenerator`, or a model behind an API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from typing import TYPE_CHECKING, Any, Protocol

from solo_vlm.evaluate.run_folder import AnswerFile, SavedAnswer
from solo_vlm.generate import GenerationOutput, GenerationRequest
from solo_vlm.models.solo.image_loading_solo import ImageError
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


def generate_missing(
    backend: Backend,
    keys: Sequence[tuple[int, str]],
    make_request: Callable[[int], GenerationRequest],
    saved: AnswerFile | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    finish: Callable[[int, str], str] = lambda number, text: text,
) -> list[SavedAnswer]:
    """Return the responses to all requests in order; earlier ones to the same request are reused.

    Args:
        backend: Backend that generates the others.
        keys: Row and hash of each request, see `SavedAnswer`.
        make_request: Function that makes the request of a number, whose ID it is, when the backend is ready
            for it; an ImageError fails this request alone.
        saved: File of earlier responses and of new ones; None keeps none.
        on_progress: Called with the completed and the total number of responses.
        finish: Function of a request's number and the generated text that returns the response.

    Raises:
        SoloError: The backend fails.
    """
    found = {} if saved is None else {number: saved.get(*key) for number, key in enumerate(keys)}
    done = {number: answer for number, answer in found.items() if answer}
    pending = [number for number in range(len(keys)) if number not in done]
    unreadable: list[GenerationOutput] = []

    def requests() -> Iterator[GenerationRequest]:
        for number in pending:
            try:
                yield make_request(number)
            except ImageError as error:
                unreadable.append(GenerationOutput(number, None, str(error)))

    def outputs() -> Iterator[list[GenerationOutput]]:
        if pending:
            yield from backend.generate(requests())
            yield unreadable

    on_progress(len(done), len(keys))
    for batch in outputs():
        new = {}
        for output in batch:
            number, text = output.request_id, output.text
            response = None if text is None else finish(number, text)
            new[number] = SavedAnswer(*keys[number], response, output.error)
        if saved is not None:
            saved.save(new.values())
        done |= new
        on_progress(len(done), len(keys))
    return [done[number] for number in range(len(keys))]


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
