"""SOLO as a model of lmms-eval: chats with images in, greedy answers out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from rich.progress import Progress

from solo_vlm.evaluate.answers import AnswerFile, SavedAnswer
from solo_vlm.evaluate.backends import Backend
from solo_vlm.generate import BatchGenerator, GenerationOutput, GenerationPipeline, GenerationRequest
from solo_vlm.models.solo.image_loading_solo import ImageError

DEFAULT_LONGEST = 1024
"""Tokens of an answer where a task sets no limit, as lmms-eval's own models have it."""

_BLANK_LINE = "\n\n"


class BackendModel(lmms):
    """An engine in lmms-eval's clothes.

    Args:
        engine: what answers.
        memory: answers that are there already, and where new ones go as they come; None: nowhere.
        longest: tokens of an answer, in place of what the tasks say.
        stop_at_blank_line: end an answer at a blank line where the task says so. By default it is not:
            lmms-eval puts this into every task that names no end, and it cuts off answers with reasons.
        on_progress: called with the answers there are and all that there will be.
    """

    is_simple = False

    def __init__(
        self,
        engine: Backend,
        memory: AnswerFile | None = None,
        longest: int | None = None,
        stop_at_blank_line: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self.answers: dict[int, SavedAnswer] = {}
        self.finished = False
        self._engine = engine
        self._memory = memory
        self._longest = longest
        self._stop_at_blank_line = stop_at_blank_line
        self._on_progress = on_progress

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in order of the requests. A row that cannot be asked is answered by nothing.

        What became of each row, and why one could not be asked, is in `answers`, by the number of the row.
        """
        saved = self._remembered(requests)
        self._on_progress(len(saved), len(requests))
        for answers in self._ask({n: request for n, request in enumerate(requests) if n not in saved}):
            fresh = {answer.request_id: self._save(answer, requests[answer.request_id]) for answer in answers}
            if self._memory is not None:
                self._memory.append(fresh.values())
            saved |= fresh
            self._on_progress(len(saved), len(requests))
        self.answers |= {answer.row: answer for answer in saved.values()}
        self.finished = True
        return [saved[number].response or "" for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("SOLO is not evaluated in several rounds")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("SOLO is evaluated by what it answers, not by likelihoods")

    def clean(self) -> None:
        """Called when all is answered, to free what the model holds; the engine is its owner's."""

    def _remembered(self, requests: Sequence[Instance]) -> dict[int, SavedAnswer]:
        if self._memory is None:
            return {}
        found = (self._memory.get(_row(request), self._fingerprint(request)) for request in requests)
        return {number: saved for number, saved in enumerate(found) if saved}

    def _ask(self, requests: Mapping[int, Instance]) -> Iterator[list[GenerationOutput]]:
        unreadable: list[GenerationOutput] = []

        def questions() -> Iterator[GenerationRequest]:
            for number, request in requests.items():
                try:
                    yield self._question(number, request)
                except ImageError as error:
                    unreadable.append(GenerationOutput(number, None, str(error)))

        if requests:
            yield from self._engine.generate(questions())
            yield unreadable

    def _question(self, number: int, request: Instance) -> GenerationRequest:
        _, to_messages, settings, row, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][row]))
        return GenerationRequest(number, messages.to_hf_messages(), self.limit(settings))

    def _save(self, answer: GenerationOutput, request: Instance) -> SavedAnswer:
        text = answer.text
        if text is not None:
            text = _cut(text, self._ends(_settings(request))).strip()
        return SavedAnswer(_row(request), self._fingerprint(request), text, answer.error)

    def limit(self, settings: Mapping[str, Any]) -> int:
        """Tokens that an answer may have under the settings of a task."""
        return self._longest or settings.get("max_new_tokens") or DEFAULT_LONGEST

    def _ends(self, settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        ends = [until] if isinstance(until, str) else until
        return [end for end in ends if end != _BLANK_LINE or self._stop_at_blank_line]

    def _fingerprint(self, request: Instance) -> str:
        """Hash of all that an answer depends on besides the model."""
        settings = _settings(request)
        asked = [request.args[0], self.limit(settings), self._ends(settings)]
        if self._memory is not None:
            task, split = request.args[4:]
            asked += _image_hashes(self.task_dict[task][split][_row(request)])
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


class Solo(BackendModel):
    """The model `solo` of lmms-eval's own command line: `--model solo --model_args pretrained=DIR`.

    Args:
        pretrained: folder or hub id.
        batch_size: chats that are answered at once.
        dtype: "auto" (as stored) or a torch dtype's name.
        device: default: the accelerator if there is one.
        longest: see `BackendModel`.
        stop_at_blank_line: see `BackendModel`.
        max_batch_size: lmms-eval passes it; without effect.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        dtype: str = "auto",
        device: str | None = None,
        longest: int | None = None,
        stop_at_blank_line: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        pipeline = GenerationPipeline.from_pretrained(pretrained, dtype, device)
        engine = BatchGenerator(pipeline, int(batch_size))
        super().__init__(engine, longest=longest, stop_at_blank_line=stop_at_blank_line)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """As `BackendModel`, with a progress bar."""
        with Progress() as progress:
            bar = progress.add_task("answering")
            self._on_progress = lambda done, total: progress.update(bar, completed=done, total=total)
            return super().generate_until(requests)


def _row(request: Instance) -> int:
    return request.args[3]


def _settings(request: Instance) -> Mapping[str, Any]:
    return request.args[2]


def _image_hashes(row: Mapping[str, Any]) -> list[str]:
    """Hashes of a row's encoded images: someone may have mended a file since the run was stopped."""
    values = [part for value in row.values() for part in (value if isinstance(value, list) else [value])]
    images = [value for value in values if isinstance(value, Mapping) and set(value) == {"bytes", "path"}]
    return [hashlib.sha256(image["bytes"] or str(image["path"]).encode()).hexdigest() for image in images]


def _cut(text: str, ends: Sequence[str]) -> str:
    """The text before the first of these ends."""
    return text[: min((place for end in ends if (place := text.find(end)) >= 0), default=len(text))]
