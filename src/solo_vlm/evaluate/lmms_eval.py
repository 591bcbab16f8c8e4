"""lmms-eval: adapter around a backend, and its stock tasks on local data."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lmms_eval.tasks
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import ImageFile
from rich.progress import Progress

from solo_vlm.evaluate.backends import Backend
from solo_vlm.evaluate.data import EncodedRows, decoded
from solo_vlm.evaluate.run_folder import AnswerFile, SavedAnswer
from solo_vlm.evaluate.scoring.score import Benchmark
from solo_vlm.generate import BatchGenerator, GenerationOutput, GenerationPipeline, GenerationRequest
from solo_vlm.models.solo.image_loading_solo import ImageError

# lmms-eval lets Pillow pad truncated images. Here such a row is a bad row.
ImageFile.LOAD_TRUNCATED_IMAGES = False

DEFAULT_MAX_NEW_TOKENS = 1024
"""Maximum length of an answer if the task sets none, as in lmms-eval's own models."""

_BLANK_LINE = "\n\n"
_SCORED_BY_GPT = {"mathvista"}
"""Benchmarks that lmms-eval scores by asking GPT; it guesses without a key, so it does not score them."""


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
        done: dict[int, SavedAnswer] = {}
        if self._file is not None:
            found = (self._file.get(_row(request), self._fingerprint(request)) for request in requests)
            done = {number: saved for number, saved in enumerate(found) if saved}
        self._on_progress(len(done), len(requests))
        for outputs in self._generate({n: request for n, request in enumerate(requests) if n not in done}):
            new = {output.request_id: self._result(output, requests[output.request_id]) for output in outputs}
            if self._file is not None:
                self._file.save(new.values())
            done |= new
            self._on_progress(len(done), len(requests))
        self.responses |= {result.row: result for result in done.values()}
        self.finished = True
        return [done[number].response or "" for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("multi-round tasks are not supported")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks scored by likelihood are not supported")

    def clean(self) -> None:
        """Keep the model, which lmms-eval would free here; the backend belongs to the caller."""

    def limit(self, settings: Mapping[str, Any]) -> int:
        """Return the maximum length of an answer under the settings of a task."""
        return self._max_new_tokens or settings.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS

    def _generate(self, requests: Mapping[int, Instance]) -> Iterator[list[GenerationOutput]]:
        unreadable: list[GenerationOutput] = []

        def generation_requests() -> Iterator[GenerationRequest]:
            for number, request in requests.items():
                _, to_messages, settings, row, task, split = request.args
                try:
                    messages = ChatMessages(messages=to_messages(self.task_dict[task][split][row]))
                    yield GenerationRequest(number, messages.to_hf_messages(), self.limit(settings))
                except ImageError as error:
                    unreadable.append(GenerationOutput(number, None, str(error)))

        if requests:
            yield from self._backend.generate(generation_requests())
            yield unreadable

    def _result(self, output: GenerationOutput, request: Instance) -> SavedAnswer:
        text = output.text
        if text is not None:
            stops = [place for stop in self._stops(request.args[2]) if (place := text.find(stop)) >= 0]
            text = text[: min(stops, default=len(text))].strip()
        return SavedAnswer(_row(request), self._fingerprint(request), text, output.error)

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
            asked += _image_hashes(self.task_dict[task][split][_row(request)])
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


def _row(request: Instance) -> int:
    return request.args[3]


def _image_hashes(row: Mapping[str, Any]) -> list[str]:
    """Return hashes of a row's encoded images: a file may have been repaired since the run was stopped."""
    values = [part for value in row.values() for part in (value if isinstance(value, list) else [value])]
    images = [value for value in values if isinstance(value, Mapping) and set(value) == {"bytes", "path"}]
    return [hashlib.sha256(image["bytes"] or str(image["path"]).encode()).hexdigest() for image in images]


# ----------------------------------------------------------------------------------------- stock tasks


class LocalTask(ConfigurableMessagesTask):
    """Stock task of lmms-eval for a benchmark, with its prompts and scores, on rows with its columns.

    Images are decoded when the prompt is built, so an unreadable image fails its own row only.
    """

    def __init__(self, benchmark: Benchmark, rows: EncodedRows) -> None:
        self._rows = rows
        (file,) = Path(lmms_eval.tasks.__file__).parent.glob(f"*/{benchmark.harness_task}.yaml")
        # MathVista's functions otherwise create an OpenAI client on import, which fails without a key.
        with patch.dict(os.environ, {"API_TYPE": "dummy"}):
            config = load_yaml_config(str(file), mode="full")
        self._split = config["test_split"]
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Set the rows where the parent class would load the dataset."""
        self.dataset = {self._split: self._rows}
        self.dataset_no_image = {self._split: self._rows.without_images()}

    def prompt(self, row: int) -> str:
        """Return the exact text of a row's prompt, without its images."""
        return self.doc_to_text(self.dataset_no_image[self._split][row])

    def doc_to_visual(self, doc: Mapping[str, Any]) -> Any:
        """Return the decoded images of a row.

        Raises:
            ImageError: An image is missing or cannot be read.
        """
        images = {name: decoded(value) for name, value in doc.items()}
        try:
            return super().doc_to_visual(images)
        except AttributeError as error:  # the stock functions convert any value to RGB
            raise ImageError("the row has no image") from error


def run_task(
    task: LocalTask, benchmark: Benchmark, model: BackendModel, limit: int | None = None
) -> tuple[dict[str, float], str]:
    """Generate responses to all rows of a task through lmms-eval; the model keeps them.

    Args:
        task: Task, which can be run once.
        benchmark: Benchmark of the task.
        model: Model that generates and keeps the responses.
        limit: Maximum number of rows, from the first.

    Returns:
        Scores by metric in lmms-eval's units (some fractions, some points), and the reason if there are none.

    Raises:
        SoloError: The backend fails.
    """
    by_gpt = benchmark.name in _SCORED_BY_GPT
    try:
        results = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            predict_only=by_gpt,
            cli_args=argparse.Namespace(process_with_media=False),
        )
    except Exception as error:
        if not model.finished:
            raise
        # Its scorers fail on a partial benchmark, such as one question of a pair of MME.
        return {}, f"lmms-eval could not score this: {str(error) or type(error).__name__}"
    if by_gpt:
        return {}, "lmms-eval scores this task by asking GPT, so its scorer did not run"
    metrics = results["results"][benchmark.harness_task]
    return {
        key.partition(",")[0]: float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and "_stderr" not in key.partition(",")[0]
    }, ""
