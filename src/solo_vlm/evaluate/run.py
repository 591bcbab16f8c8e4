"""An evaluation run: generate responses to the rows of benchmarks, score them, write a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from solo_vlm import __version__
from solo_vlm.evaluate.backends import Backend
from solo_vlm.evaluate.data import Rows
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.report import TaskReport, write_reports
from solo_vlm.evaluate.run_folder import AnswerFile, RunFolder
from solo_vlm.evaluate.scoring.score import Benchmark, Score
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import check_new

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
        tasks: Sequence[tuple[Benchmark, Rows]],
        progress_bar: ProgressBar = lambda title: nullcontext(lambda done, total: None),
    ) -> list[Score]:
        """Generate responses to the rows of benchmarks, report, and return the score of each benchmark.

        Raises:
            SoloError: lmms-eval is missing, the folder is not empty and has no run of this model, or the
                backend fails. Earlier responses are kept.
        """
        try:
            import solo_vlm.evaluate.lmms_eval  # noqa: F401
        except ImportError as error:
            raise SoloError(
                f"evaluation needs lmms-eval ({error}): pip install 'solo-vlm[eval]', "
                "then pip install --no-deps lmms-eval==0.7.3"
            ) from error
        folder = RunFolder(self.out)
        run = begin_run(folder, self.model, self.limit, self.max_new_tokens, _PACKAGES)
        reports: list[TaskReport] = []
        for benchmark, rows in tasks:
            with progress_bar(benchmark.name) as on_progress:
                reports.append(self._evaluate(folder, backend, benchmark, rows, on_progress))
            run["tasks"][benchmark.name] = reports[-1].metadata
            folder.write_scores(report.score for report in reports)
            folder.write_metadata(run)
        write_reports(self.out, run, reports)
        return [report.score for report in reports]

    def _evaluate(
        self,
        folder: RunFolder,
        backend: Backend,
        benchmark: Benchmark,
        rows: Rows,
        on_progress: Callable[[int, int], None],
    ) -> TaskReport:
        from solo_vlm.evaluate.lmms_eval import BackendModel, LocalTask, run_task

        started = time.perf_counter()
        try:
            task = LocalTask(benchmark, rows.encoded)
            prompt = task.prompt(0)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}; its columns are: {', '.join(rows.columns[0])}"
            raise SoloError(f"{benchmark.name}: lmms-eval cannot use the first row ({what})") from error
        with AnswerFile(self.out / "answers" / f"{benchmark.name}.jsonl") as saved:
            model = BackendModel(backend, saved, self.max_new_tokens, on_progress=on_progress)
            harness_scores, harness_note = run_task(task, benchmark, model, self.limit)
        responses = sorted(model.responses.items())
        predictions = [
            Prediction(rows.ids[row], response.response, rows.columns[row]) for row, response in responses
        ]
        folder.write_predictions(benchmark.name, predictions)
        answers = benchmark.scorer(predictions)
        score = benchmark.summarize(answers)
        raw = {f"lmms-eval: {metric}": value for metric, value in harness_scores.items()}
        return TaskReport(
            benchmark,
            replace(score, raw={**score.raw, **raw}, filtered=score.filtered + rows.filtered),
            answers,
            rows,
            task.prompt,
            {
                "rows": len(rows),
                "failures": {rows.ids[row]: response.error for row, response in responses if response.error},
                "prompt": prompt,
                "max_new_tokens": model.limit(task.config.generation_kwargs),
                "harness_task": task.config.task,
                "harness_note": harness_note,
                "seconds": round(time.perf_counter() - started, 1),
            },
        )


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
