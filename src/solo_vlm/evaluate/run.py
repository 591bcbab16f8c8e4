"""An evaluation run: rows of benchmarks asked, answers kept as they come, then scores and a report."""

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
from solo_vlm.evaluate.answers import AnswerFile
from solo_vlm.evaluate.backends import Backend
from solo_vlm.evaluate.benchmarks import Benchmark
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.report import TaskReport, write_reports
from solo_vlm.evaluate.rows import Rows
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.evaluate.score import Score
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import check_new

if TYPE_CHECKING:
    from solo_vlm.evaluate.adapter import BackendModel
    from solo_vlm.evaluate.harness import HarnessScores, LocalTask

_PACKAGES = ("lmms_eval", "torch", "transformers", "tokenizers", "datasets", "pillow", "numpy")

ProgressBar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class ModelFacts:
    """Which model answers.

    Attributes:
        name: folder, hub id, or name at a server.
        engine: what runs it.
        sha256: of its weights, see `weights_hash`; None where they are not here.
        more: what else should be on record, such as how a chat is rendered.
    """

    name: str
    engine: str
    sha256: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"name": self.name, "engine": self.engine, "sha256": self.sha256, **self.more}

    def is_that_of(self, facts: Mapping[str, Any]) -> bool:
        """Whether a run with these facts had the same model; it may be in another place now."""
        may_differ = {"base_url", "name"} if self.sha256 else {"base_url"}
        ours, theirs = (
            {key: value for key, value in model.items() if key not in may_differ}
            for model in (self.as_dict(), facts.get("model", {}))
        )
        return ours == theirs


@dataclass(frozen=True)
class EvaluationRun:
    """A run and its folder. In the folder of one that was stopped, of the same model, it goes on from there.

    Attributes:
        out: the folder: `answers/` as they come, `predictions/`, scores, facts and report when all is done.
        model: who answers, for the record.
        limit: rows of each task, from the first; None: all.
        longest: tokens of an answer, in place of what the tasks say.
    """

    out: Path
    model: ModelFacts
    limit: int | None = None
    longest: int | None = None

    def evaluate(
        self,
        engine: Backend,
        tasks: Sequence[tuple[Benchmark, Rows]],
        progress_bar: ProgressBar = lambda title: nullcontext(lambda done, total: None),
    ) -> list[Score]:
        """Ask, score and report.

        Args:
            engine: answers.
            tasks: benchmarks, each with its rows.
            progress_bar: makes one of a title.

        Returns:
            The score of each benchmark.

        Raises:
            SoloError: lmms-eval is missing; the folder holds something else, or a run of another model; or
                the engine cannot go on. What has been answered is kept.
        """
        _require_lmms_eval()
        folder = RunFolder(self.out)
        facts = self._begin(folder)
        reports: list[TaskReport] = []
        for benchmark, rows in tasks:
            with progress_bar(benchmark.name) as on_progress:
                reports.append(self._evaluate(folder, engine, benchmark, rows, on_progress))
            facts["tasks"][benchmark.name] = reports[-1].facts
            folder.write_scores(report.score for report in reports)
            folder.write_facts(facts)
        write_reports(self.out, facts, reports)
        return [report.score for report in reports]

    def _begin(self, folder: RunFolder) -> dict[str, Any]:
        """Facts of the run, on disk before the first answer is."""
        if (self.out / "run.json").exists():
            if not self.model.is_that_of(folder.read_facts()):
                raise SoloError(f"{self.out} holds a run of another model: choose another folder")
        else:
            check_new(self.out)
        facts = {
            "model": self.model.as_dict(),
            "settings": {"rows of each task": self.limit, "longest answer": self.longest},
            "versions": _versions(),
            "tasks": {},
        }
        folder.write_facts(facts)
        return facts

    def _evaluate(
        self,
        folder: RunFolder,
        engine: Backend,
        benchmark: Benchmark,
        rows: Rows,
        on_progress: Callable[[int, int], None],
    ) -> TaskReport:
        from solo_vlm.evaluate.adapter import BackendModel
        from solo_vlm.evaluate.harness import LocalTask, ask_all

        started = time.perf_counter()
        try:
            task = LocalTask(benchmark, rows.encoded)
            prompt = task.prompt(0)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}; its columns are: {', '.join(rows.columns[0])}"
            raise SoloError(f"{benchmark.name}: lmms-eval cannot use the first row ({what})") from error
        with AnswerFile(self.out / "answers" / f"{benchmark.name}.jsonl") as memory:
            model = BackendModel(engine, memory, self.longest, on_progress=on_progress)
            harness = ask_all(task, benchmark, model, self.limit)
        predictions = [
            Prediction(rows.ids[row], answer.response, rows.columns[row])
            for row, answer in sorted(model.answers.items())
        ]
        folder.write_predictions(benchmark.name, predictions)
        answers = benchmark.scorer(predictions)
        return TaskReport(
            benchmark,
            _with_harness(benchmark.summarise(answers), harness, rows),
            answers,
            rows,
            task.prompt,
            _facts(task, prompt, model, rows, harness, time.perf_counter() - started),
        )


def _with_harness(score: Score, harness: HarnessScores, rows: Rows) -> Score:
    raw = {f"lmms-eval: {metric}": value for metric, value in harness.scores.items()}
    return replace(score, raw={**score.raw, **raw}, filtered=score.filtered + rows.filtered)


def _facts(
    task: LocalTask, prompt: str, model: BackendModel, rows: Rows, harness: HarnessScores, seconds: float
) -> dict[str, Any]:
    failures = {rows.ids[row]: answer.error for row, answer in sorted(model.answers.items()) if answer.error}
    return {
        "rows": len(rows),
        "failures": failures,
        "prompt": prompt,
        "max_new_tokens": model.limit(task.config.generation_kwargs),
        "harness_task": task.config.task,
        "harness_note": harness.note,
        "seconds": round(seconds, 1),
    }


def _versions() -> dict[str, str]:
    return {
        "solo_vlm": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def _require_lmms_eval() -> None:
    try:
        import solo_vlm.evaluate.harness  # noqa: F401
    except ImportError as error:
        raise SoloError(
            f"evaluation needs lmms-eval ({error}): pip install 'solo-vlm[eval]', "
            "then pip install --no-deps lmms-eval==0.7.3"
        ) from error
