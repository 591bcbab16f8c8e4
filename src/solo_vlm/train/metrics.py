"""Figures of a run, step by step: a progress bar, lines of JSON, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Writes the metrics of a step everywhere they are read.

    Args:
        folder: of the run; gets `metrics.jsonl` and `tensorboard/`.
        progress: bar to advance.
        steps: of the run.
        done: steps that an earlier process has done.
    """

    def __init__(self, folder: Path, progress: Progress, name: str, steps: int, done: int) -> None:
        _forget_after(folder / "metrics.jsonl", done)
        self._lines = (folder / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done)
        self._progress = progress
        self._task = progress.add_task(name, total=steps, completed=done, figures="")

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures of a step; `step` counts from 1."""
        self._lines.write(json.dumps({"step": step, **figures}) + "\n")
        self._lines.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        shown = f"loss {figures['loss']:.3f}  {figures['tokens_per_second']:,.0f} tokens/s"
        self._progress.update(self._task, figures=shown)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        self._board.close()


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr: name, bar, steps, time left, figures."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _forget_after(path: Path, step: int) -> None:
    """Drop lines past the checkpoint that a run goes on from: those steps are done again."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))
