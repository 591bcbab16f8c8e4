"""Figures of a run, step by step: a live view, lines of JSON, trackers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from solo_vlm.train.trackers import Tracker
from solo_vlm.utils.files import new_file

_SHOWN = {  # in the live view: name, and how it is written
    "loss": "{:.4f}",
    "validation_loss": "{:.4f}",
    "learning_rate": "{:.2e}",
    "gradient_norm": "{:.3f}",
    "tokens_per_second": "{:,.0f}",
    "mfu": "{:.1%}",
    "fill": "{:.1%}",
    "data_wait_seconds": "{:.3f}",
    "memory_gb": "{:.2f}",
    "skipped_steps": "{:.0f}",
}


class MetricsLog:
    """Writes the metrics of a step everywhere they are read.

    Args:
        folder: of the run; gets `metrics.jsonl`.
        trackers: where they go besides.
        progress: bar to advance.
        steps: of the run.
        done: steps that an earlier process has done.
    """

    def __init__(
        self, folder: Path, trackers: Sequence[Tracker], progress: Progress, steps: int, done: int
    ) -> None:
        _forget_after(folder / "metrics.jsonl", done)
        self._lines = (folder / "metrics.jsonl").open("a")
        self._trackers = trackers
        self._progress = progress
        self._task = progress.add_task(folder.name, total=steps, completed=done, figures={})

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures of a step; `step` counts from 1."""
        self._lines.write(json.dumps({"step": step, **figures}) + "\n")
        self._lines.flush()
        for tracker in self._trackers:
            tracker.log(figures, step)
        self._progress.update(self._task, figures=figures)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        for tracker in self._trackers:
            tracker.finish()


class LiveView(Progress):
    """A bar for each run, and under it the newest figures of the one that is under way."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if not task.finished and task.fields.get("figures"):
                yield _table(task.fields["figures"])


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """The live view, on stderr.

    Args:
        quiet: draw nothing, as in all processes but the first.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with LiveView(*columns, console=Console(stderr=True), disable=quiet) as progress:
        yield progress


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _table(figures: dict[str, float]) -> Table:
    shown = {name: form.format(figures[name]) for name, form in _SHOWN.items() if name in figures}
    table = Table.grid(padding=(0, 2))
    for _ in shown:
        table.add_column(justify="right")
    table.add_row(*(name.replace("_", " ") for name in shown), style="dim")
    table.add_row(*shown.values())
    return table


def _forget_after(path: Path, step: int) -> None:
    """Drop lines past the checkpoint that a run goes on from, and half a line: those steps are done again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except ValueError:
            break
    with new_file(path) as partial:
        partial.write_text("".join(kept))
