"""Run of an ablation: training of missing stages, measurement of the models, comparison of the variants."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from solo_vlm.experiments.ablations.measure import (
    Measurement,
    count_samples,
    measuring_jobs,
    plan_measurements,
)
from solo_vlm.experiments.ablations.pipeline import (
    Stage,
    build_pipelines,
    missing_stages,
    prepare_data,
    write_initial_model,
)
from solo_vlm.experiments.ablations.report import Report, Row, write_rows
from solo_vlm.experiments.ablations.settings import Ablation
from solo_vlm.experiments.launcher import Executor, TrainingRun, finish_jobs, train_runs
from solo_vlm.train.metrics import read_metrics

if TYPE_CHECKING:
    from rich.progress import Progress

_REFRESH_SECONDS = 1.0  # between two checks of the progress of jobs


def run_ablation(
    ablation: Ablation,
    progress: Progress,
    fraction: float = 1.0,
    processes: int = 1,
    executor: Executor = "local",
) -> tuple[Report, Path]:
    """Train and measure what is missing, then compare the variants.

    A repeated call keeps finished work; interrupted runs resume from their newest checkpoints, and
    interrupted measurements after their last answer.

    Args:
        fraction: Share of the steps of every stage to train.
        processes: Maximum number of concurrent runs.
        executor: See `launcher.run_jobs`.

    Returns:
        The report, and the folder `root/NAME` with `results.parquet` and `report.json`.

    Raises:
        SoloError: The settings do not fit the data or the LLM, or a job failed.
        Stopped: A signal arrived; progress is saved.
    """
    settings = ablation.settings
    task = progress.add_task("data", total=1)
    prepare_data(settings)
    progress.update(task, completed=1)
    pipelines = build_pipelines(ablation, fraction)
    measurements = plan_measurements(settings, pipelines)
    distinct = {m.file: m for by_metric in measurements for m in by_metric.values()}
    missing = [measurement for measurement in distinct.values() if measurement.result() is None]
    _run_stages(missing_stages(m.stage for m in missing), progress, processes, executor)
    _measure(missing, progress, processes, executor)
    rows = [
        Row(pipeline.variant, pipeline.seed, metric, m.kind, *result)
        for pipeline, by_metric in zip(pipelines, measurements, strict=True)
        for metric, m in by_metric.items()
        if (result := m.result())
    ]
    name = ablation.name if fraction == 1 else f"{ablation.name}-{fraction:g}"
    out = Path(settings.root) / name
    write_rows(out / "results.parquet", rows)
    report = Report.make(ablation, fraction, pipelines, rows)
    report.write(out / "report.json")
    return report, out


def _run_stages(stages: Sequence[Stage], progress: Progress, processes: int, executor: Executor) -> None:
    """Run stages by depth, so that the input models of each level exist."""
    if not stages:
        return
    runs = [stage.run for stage in stages if stage.run]
    steps = sum(run.recipe.steps or 0 for run in runs)
    refresh = _Refresh(progress, "training steps", steps, lambda: sum(map(_completed_steps, runs)))
    done = 0
    for _, level in groupby(stages, key=lambda stage: stage.depth):
        for name in _run_level(list(level), processes, executor, refresh):
            done += 1
            progress.console.print(f"{name}: done, {done} of {len(stages)} models", highlight=False)
    refresh.update()


def _run_level(
    stages: Sequence[Stage], processes: int, executor: Executor, on_wait: Callable[[], None]
) -> Iterator[str]:
    """Yield the run names of stages as they finish."""
    for stage in stages:
        if stage.run is None:
            write_initial_model(stage)
            yield stage.run_name
    for run in train_runs([stage.run for stage in stages if stage.run], processes, executor, on_wait):
        yield run.name


def _measure(missing: Sequence[Measurement], progress: Progress, processes: int, executor: Executor) -> None:
    if not missing:
        return
    jobs = list(measuring_jobs(missing))
    generating = [measurement for measurement in missing if measurement.kind == "accuracy"]
    sizes = {data: count_samples(data) for data in {measurement.data for measurement in generating}}
    questions = sum(sizes[measurement.data] for measurement in generating)
    refresh = _Refresh(
        progress, "held-out answers", questions, lambda: sum(_line_count(m.answers) for m in generating)
    )
    for done, job in enumerate(finish_jobs(jobs, processes, executor, refresh), start=1):
        progress.console.print(f"{job.name}: measured, {done} of {len(jobs)} models", highlight=False)
    refresh.update()


class _Refresh:
    """Callback that updates a progress bar, at most once per second, from the output of jobs."""

    def __init__(self, progress: Progress, title: str, total: int, completed: Callable[[], int]) -> None:
        self._progress = progress
        self._completed = completed
        self._task = progress.add_task(title, total=total)
        self._next = 0.0

    def __call__(self) -> None:
        if time.monotonic() >= self._next:
            self.update()
            self._next = time.monotonic() + _REFRESH_SECONDS

    def update(self) -> None:
        self._progress.update(self._task, completed=self._completed())


def _completed_steps(run: TrainingRun) -> int:
    try:
        return int(read_metrics(run.folder)[-1]["step"])
    except (OSError, IndexError, ValueError):  # no file yet, or an incomplete line
        return 0


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
