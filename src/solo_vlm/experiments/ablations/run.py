"""The order of an ablation: data, models level by level, measurements, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from rich.progress import Progress

from solo_vlm.experiments.ablations.chain import Link, make_chains
from solo_vlm.experiments.ablations.data import prepare_data
from solo_vlm.experiments.ablations.measure import Measurement, count_samples, measurements, measuring_jobs
from solo_vlm.experiments.ablations.report import Report, Row, write_rows
from solo_vlm.experiments.ablations.settings import Ablation
from solo_vlm.experiments.ablations.start import write_start
from solo_vlm.experiments.launcher.job import Engine, finish_jobs
from solo_vlm.experiments.launcher.training import TrainingRun, train_runs
from solo_vlm.train.metrics import read_metrics

_LOOK_SECONDS = 1.0  # between two looks at how far jobs are


def run_ablation(
    ablation: Ablation,
    progress: Progress,
    fraction: float = 1.0,
    processes: int = 1,
    engine: Engine = "local",
) -> tuple[Report, Path]:
    """Train and measure whatever is not there yet, then compare the arms.

    Started again, it keeps what is finished; interrupted runs go on from their newest checkpoints, and
    interrupted measurements from their last answer.

    Args:
        ablation: as read.
        progress: bars to draw on.
        fraction: of the steps of all stages.
        processes: runs side by side.
        engine: see `jobs.job.run_jobs`.

    Returns:
        The report, and the folder `root/NAME` with `results.parquet` and `report.json`.

    Raises:
        SoloError: the settings do not fit the data or the LLM, or a job has failed.
        Stopped: by a signal; what ran is saved.
    """
    settings = ablation.settings
    task = progress.add_task("data", total=1)
    prepare_data(settings)
    progress.update(task, completed=1)
    chains = make_chains(ablation, fraction)
    wanted = measurements(settings, chains)
    every = {m.file: m for found in wanted for m in found.values()}
    unmeasured = [measurement for measurement in every.values() if measurement.result() is None]
    _make(missing_links([m.link for m in unmeasured]), progress, processes, engine)
    _measure(unmeasured, progress, processes, engine)
    rows = [
        Row(chain.arm, chain.seed, metric, m.kind, *result)
        for chain, found in zip(chains, wanted, strict=True)
        for metric, m in found.items()
        if (result := m.result())
    ]
    name = ablation.name if fraction == 1 else f"{ablation.name}-{fraction:g}"
    out = Path(settings.root) / name
    write_rows(out / "results.parquet", rows)
    report = Report.make(ablation, fraction, chains, rows)
    report.write(out / "report.json")
    return report, out


def missing_links(ends: Sequence[Link]) -> list[Link]:
    """The links that must be made to have the given ones, those before each first."""
    missing: dict[str, Link] = {}
    waiting: list[Link | None] = list(ends)
    while waiting:
        link = waiting.pop()
        if link is not None and link.name not in missing and not link.ready:
            missing[link.name] = link
            waiting.append(link.parent)
    return sorted(missing.values(), key=lambda link: link.depth)


def _make(links: Sequence[Link], progress: Progress, processes: int, engine: Engine) -> None:
    """Level by level: what a level is made of is then there."""
    if not links:
        return
    runs = [link.run for link in links if link.run]
    steps = sum(run.recipe.steps or 0 for run in runs)
    look = _Look(progress, "training steps", steps, lambda: sum(map(_steps_done, runs)))
    done = 0
    for _, level in groupby(links, key=lambda link: link.depth):
        for made in _make_level(list(level), processes, engine, look):
            done += 1
            progress.console.print(f"{made}: done, {done} of {len(links)} models", highlight=False)
    look.finish()


def _make_level(
    links: Sequence[Link], processes: int, engine: Engine, on_wait: Callable[[], None]
) -> Iterator[str]:
    """Yield the names of models as they are finished."""
    for link in links:
        if link.run is None:
            write_start(link)
            yield link.name
    for run in train_runs([link.run for link in links if link.run], processes, engine, on_wait):
        yield run.name


def _measure(unmeasured: Sequence[Measurement], progress: Progress, processes: int, engine: Engine) -> None:
    if not unmeasured:
        return
    jobs = list(measuring_jobs(unmeasured))
    asked = [measurement for measurement in unmeasured if measurement.kind == "accuracy"]
    sizes = {data: count_samples(data) for data in {measurement.data for measurement in asked}}
    questions = sum(sizes[measurement.data] for measurement in asked)
    look = _Look(progress, "held-out answers", questions, lambda: sum(_lines(m.answers) for m in asked))
    for done, job in enumerate(finish_jobs(jobs, processes, engine, look), start=1):
        progress.console.print(f"{job.name}: measured, {done} of {len(jobs)} models", highlight=False)
    look.finish()


class _Look:
    """Moves a bar by looking, every now and then, at what jobs have written."""

    def __init__(self, progress: Progress, title: str, total: int, done: Callable[[], int]) -> None:
        self._progress = progress
        self._done = done
        self._task = progress.add_task(title, total=total)
        self._next = 0.0

    def __call__(self) -> None:
        if time.monotonic() >= self._next:
            self.finish()
            self._next = time.monotonic() + _LOOK_SECONDS

    def finish(self) -> None:
        self._progress.update(self._task, completed=self._done())


def _steps_done(run: TrainingRun) -> int:
    try:
        return int(read_metrics(run.folder)[-1]["step"])
    except (OSError, IndexError, ValueError):  # nothing is there yet, or half a line
        return 0


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
