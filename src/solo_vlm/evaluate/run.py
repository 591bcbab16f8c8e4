"""An evaluation run: generate responses to the rows of benchmarks, score them, write a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solo_vlm import __version__
from solo_vlm.evaluate.backends import Backend
from solo_vlm.evaluate.data import Rows
from solo_vlm.evaluate.predictions import ROW_VALUES, Prediction
from solo_vlm.evaluate.report import TaskReport, write_reports
from solo_vlm.evaluate.run_folder import AnswerFile, RunFolder
from solo_vlm.evaluate.saved_task import harness_answers
from solo_vlm.evaluate.scoring.score import Benchmark, Score
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import check_new

if TYPE_CHECKING:
    from solo_vlm.evaluate.stock_tasks import HarnessResult, StockTask

_PACKAGES = ("lmms_eval", "torch", "transformers", "tokenizers", "datasets", "pillow", "numpy")

ProgressBar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class ModelInfo:
    """Identity of the evaluated model."""

    name: str  # folder, hub ID, or name at a server
    backend: str  # what runs it
    sha256: str | None = None  # hash of its weights, see `weights_hash`; None if they are not local
    more: Mapping[str, Any] = field(default_factory=dict)  # recorded too, such as the chat template

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"name": self.name, "backend": self.backend, "sha256": self.sha256, **self.more}

    def matches(self, run: Mapping[str, Any]) -> bool:
        """Return whether a run with this metadata had the same model, possibly at another path or URL."""
        may_differ = {"base_url", "name"} if self.sha256 else {"base_url"}
        ours, theirs = (
            {key: value for key, value in model.items() if key not in may_differ}
            for model in (self.as_dict(), run.get("model", {}))
        )
        return ours == theirs


@dataclass(frozen=True)
class EvaluationRun:
    """A run and its folder; an interrupted run of the same model resumes."""

    out: Path  # folder: `answers/` as they arrive, `predictions/`, then scores, metadata and reports
    model: ModelInfo
    limit: int | None = None  # maximum number of rows per task, from the first; None runs all
    max_new_tokens: int | None = None  # maximum length of an answer, overriding the tasks

    def evaluate(
        self,
        backend: Backend,
        tasks: Sequence[tuple[Benchmark, Rows] | StockTask],
        progress_bar: ProgressBar = lambda title: nullcontext(lambda done, total: None),
        failed: Mapping[str, str] | None = None,
    ) -> tuple[list[Score], dict[str, str]]:
        """Generate responses to the rows of tasks, score them and write a report.

        Args:
            backend: Backend that generates the responses.
            tasks: Benchmarks with their rows, and tasks of lmms-eval with its own data and scores.
            progress_bar: Returns a context in which a function shows the progress of a task.
            failed: Reasons of tasks that failed before, by task, for the report.

        Returns:
            The scores, and the reasons of the tasks that failed.

        Raises:
            SoloError: lmms-eval is missing, the folder is not empty and has no run of this model, the backend
                fails, or the only task does. Earlier responses are kept.
        """
        check_harness()
        from solo_vlm.evaluate.stock_tasks import TaskError

        folder = RunFolder(self.out)
        run = begin_run(folder, self.model, self.limit, self.max_new_tokens, _PACKAGES)
        run["failed"] = dict(failed or {})
        reports: list[TaskReport] = []
        for task in tasks:
            name = task[0].name if isinstance(task, tuple) else task.config.task
            try:
                with progress_bar(name) as on_progress:
                    reports.append(self._evaluate(folder, backend, task, on_progress))
            except TaskError as error:
                if len(tasks) == 1 and not failed:
                    raise SoloError(f"{name}: {error}") from error
                run["failed"][name] = str(error)
            else:
                run["tasks"][name] = reports[-1].metadata
            folder.write_scores(report.score for report in reports)
            folder.write_metadata(run)
        write_reports(self.out, run, reports)
        return [report.score for report in reports], run["failed"]

    def _evaluate(
        self,
        folder: RunFolder,
        backend: Backend,
        task: tuple[Benchmark, Rows] | StockTask,
        on_progress: Callable[[int, int], None],
    ) -> TaskReport:
        if isinstance(task, tuple):
            benchmark, rows = task
            return self._evaluate_benchmark(folder, backend, benchmark, rows, on_progress)
        from solo_vlm.evaluate.stock_tasks import row_values, stock_score

        rows = Rows.all_of(task.dataset[task.split])
        run = self._answer(backend, task, rows, on_progress)
        values = row_values(task, len(run.predictions))
        predictions = [
            replace(prediction, row={**prediction.row, ROW_VALUES: value})
            for prediction, value in zip(run.predictions, values, strict=True)
        ]
        folder.write_predictions(task.config.task, predictions)
        score = stock_score(task, run.result, predictions, len(rows))
        answers = harness_answers(predictions, next(iter(run.result.metrics)))
        return TaskReport(score, answers, rows, task.prompt, run.metadata)

    def _evaluate_benchmark(
        self,
        folder: RunFolder,
        backend: Backend,
        benchmark: Benchmark,
        rows: Rows,
        on_progress: Callable[[int, int], None],
    ) -> TaskReport:
        from solo_vlm.evaluate.stock_tasks import LocalTask, TaskError, by_gpt

        try:
            task = LocalTask(benchmark, rows.encoded)
            task.prompt(0)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}; its columns are: {', '.join(rows.columns[0])}"
            raise TaskError(f"lmms-eval cannot use the first row ({what})") from error
        run = self._answer(backend, task, rows, on_progress, benchmark.name, by_gpt(benchmark))
        folder.write_predictions(benchmark.name, run.predictions)
        answers = benchmark.scorer(run.predictions)
        score = benchmark.summarize(answers)
        raw = {f"lmms-eval: {metric}": value for metric, value in run.result.metrics.items()}
        score = replace(score, raw={**score.raw, **raw}, filtered=score.filtered + rows.filtered)
        return TaskReport(score, answers, rows, task.prompt, run.metadata)

    def _answer(
        self,
        backend: Backend,
        task: StockTask,
        rows: Rows,
        on_progress: Callable[[int, int], None],
        name: str | None = None,
        by_gpt: bool = False,
    ) -> _Answered:
        """Generate responses to the rows of a task, reusing earlier ones, and let lmms-eval score them."""
        from solo_vlm.evaluate.lmms_eval import BackendModel
        from solo_vlm.evaluate.stock_tasks import run_task

        started = time.perf_counter()
        with AnswerFile(self.out / "answers" / f"{name or task.config.task}.jsonl") as saved:
            model = BackendModel(backend, saved, self.max_new_tokens, on_progress=on_progress)
            result = run_task(task, model, self.out / "lmms-eval", self.limit, by_gpt)
        responses = sorted(model.responses.items())
        return _Answered(
            [Prediction(rows.ids[row], response.response, rows.columns[row]) for row, response in responses],
            result,
            {
                "rows": len(rows),
                "failures": {rows.ids[row]: response.error for row, response in responses if response.error},
                "prompt": task.prompt(0),
                "max_new_tokens": model.limit(task.config.generation_kwargs),
                "harness_task": task.config.task,
                "harness_note": result.note,
                "seconds": round(time.perf_counter() - started, 1),
            },
        )


@dataclass(frozen=True)
class _Answered:
    """Responses to a task, lmms-eval's metrics, and metadata for the report."""

    predictions: list[Prediction]
    result: HarnessResult
    metadata: dict[str, Any]


def check_harness() -> None:
    """Check that lmms-eval can be imported.

    Raises:
        SoloError: It cannot; the message has the commands that install it.
    """
    try:
        import solo_vlm.evaluate.stock_tasks  # noqa: F401
    except ImportError as error:
        raise SoloError(
            f"evaluation needs lmms-eval ({error}): pip install 'solo-vlm[eval]', "
            "then pip install --no-deps lmms-eval==0.7.3"
        ) from error


def begin_run(
    folder: RunFolder,
    model: ModelInfo,
    limit: int | None,
    max_new_tokens: int | None,
    packages: Sequence[str],
) -> dict[str, Any]:
    """Return the metadata of a run, written before the first response.

    Raises:
        SoloError: The folder is not empty and has no run of this model.
    """
    if (folder.path / "run.json").exists():
        if not model.matches(folder.read_metadata()):
            raise SoloError(f"{folder.path} holds a run of another model: choose another folder")
    else:
        check_new(folder.path)
    versions = {"solo_vlm": __version__, "python": platform.python_version()}
    run = {
        "model": model.as_dict(),
        "settings": {"limit": limit, "max_new_tokens": max_new_tokens},
        "versions": {**versions, **{name: metadata.version(name) for name in packages}},
        "tasks": {},
    }
    folder.write_metadata(run)
    return run
