"""lmms-eval: adapter around a backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lmms_eval.api.task  # noqa: F401  (sets what is undone below)
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import ImageFile
from rich.progress import Progress

from solo_vlm.evaluate.backends import Backend, generate_missing
from solo_vlm.evaluate.data import EncodedRows
from solo_vlm.evaluate.run_folder import AnswerFile, SavedAnswer
from solo_vlm.generate import BatchGenerator, GenerationPipeline, GenerationRequest
from solo_vlm.models.solo.image_loading_solo import ImageError
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.utils.errors import first_line

# lmms-eval lets Pillow pad truncated images. Here such a row is a bad row.
ImageFile.LOAD_TRUNCATED_IMAGES = False

DEFAULT_MAX_NEW_TOKENS = 1024
"""Maximum length of an answer if the task sets none, as in lmms-eval's own models."""

_BLANK_LINE = "\n\n"
_SUPPORTED = {"text", "image"}
"""Parts of a message that a backend reads."""


class BackendModel(lmms):
    """lmms-eval adapter around a backend.

    Args:
        backend: Backend that generates the responses.
        saved: File of earlier responses, which are reused, and of new ones; None keeps none.
        max_new_tokens: Maximum length of an answer, overriding the tasks.
        stop_at_blank_line: Whether an answer ends at a blank line if the task says so. lmms-eval adds this
            to every task without a stop string, and it would cut off answers that reason first.
        on_progress: Called with the completed and the total number of responses.
    """

    is_simple = False

    def __init__(
        self,
        backend: Backend,
        saved: AnswerFile | None = None,
        max_new_tokens: int | None = None,
        stop_at_blank_line: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self.responses: dict[int, SavedAnswer] = {}
        self.finished = False
        self._backend = backend
        self._file = saved
        self._max_new_tokens = max_new_tokens
        self._stop_at_blank_line = stop_at_blank_line
        self._on_progress = on_progress

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the responses in order of the requests, "" for a row that failed.

        `responses` has the result of each row, or the reason why it failed, by row number.
        """
        results = generate_missing(
            self._backend,
            [(_row(request), self._fingerprint(request)) for request in requests],
            lambda number: self._generation_request(number, requests[number]),
            self._file,
            self._on_progress,
            lambda number, text: self._stopped(text, requests[number].args[2]),
        )
        self.responses |= {result.row: result for result in results}
        self.finished = True
        return [result.response or "" for result in results]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("multi-round tasks are not supported")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks scored by likelihood are not supported")

    def clean(self) -> None:
        """Keep the model, which lmms-eval would free here; the backend belongs to the caller."""

    def limit(self, settings: Mapping[str, Any]) -> int:
        """Return the maximum length of an answer under the settings of a task."""
        return self._max_new_tokens or settings.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS

    def _generation_request(self, number: int, request: Instance) -> GenerationRequest:
        _, to_messages, settings, row, task, split = request.args
        try:
            messages = chat_of(to_messages(self.task_dict[task][split][row]))
        except (ImageError, OSError) as error:  # Pillow raises OSError
            raise ImageError(first_line(error)) from error
        return GenerationRequest(number, messages, self.limit(settings))

    def _stopped(self, text: str, settings: Mapping[str, Any]) -> str:
        """Return a generated text up to the first stop string of its task."""
        stops = [place for stop in self._stops(settings) if (place := text.find(stop)) >= 0]
        return text[: min(stops, default=len(text))].strip()

    def _stops(self, settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        return [stop for stop in stops if stop != _BLANK_LINE or self._stop_at_blank_line]

    def _fingerprint(self, request: Instance) -> str:
        """Return a hash of everything besides the model that determines a response."""
        settings = request.args[2]
        asked = [request.args[0], self.limit(settings), self._stops(settings)]
        if self._file is not None:
            task, split = request.args[4:]
            data = self.task_dict[task][split]
            encoded = data if isinstance(data, EncodedRows) else EncodedRows(data)
            asked += _image_hashes(encoded[_row(request)])
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


class Solo(BackendModel):
    """The model `solo` on lmms-eval's command line: `--model solo --model_args pretrained=DIR`.

    Args:
        pretrained: Folder or hub ID.
        batch_size: Chats per batch.
        dtype: "auto" (as stored) or the name of a torch dtype.
        device: Device of the model. Default: the accelerator, if there is one.
        max_new_tokens, stop_at_blank_line: See `BackendModel`.
        max_batch_size: Ignored; lmms-eval passes it.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        dtype: str = "auto",
        device: str | None = None,
        max_new_tokens: int | None = None,
        stop_at_blank_line: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        pipeline = GenerationPipeline.from_pretrained(pretrained, dtype, device)
        super().__init__(
            BatchGenerator(pipeline, int(batch_size)),
            max_new_tokens=max_new_tokens,
            stop_at_blank_line=stop_at_blank_line,
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate as `BackendModel` does, with a progress bar."""
        with Progress() as progress:
            bar = progress.add_task("answering")
            self._on_progress = lambda done, total: progress.update(bar, completed=done, total=total)
            return super().generate_until(requests)


def chat_of(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the chat of lmms-eval's messages.

    Raises:
        ImageError: A part is neither text nor an image.
    """
    chat = ChatMessages(messages=messages).to_hf_messages()
    kinds = {part["type"] for message in chat for part in message["content"]} - _SUPPORTED
    if kinds:
        raise ImageError(f"the prompt has {' and '.join(sorted(kinds))}; only text and images are supported")
    return chat


def _row(request: Instance) -> int:
    return request.args[3]


def _image_hashes(row: Mapping[str, Any]) -> list[str]:
    """Return hashes of a row's encoded images: a file may have been repaired since the run was stopped."""
    values = [part for value in row.values() for part in (value if isinstance(value, list) else [value])]
    images = [value for value in values if isinstance(value, Mapping) and set(value) == {"bytes", "path"}]
    return [hashlib.sha256(image["bytes"] or str(image["path"]).encode()).hexdigest() for image in images]
