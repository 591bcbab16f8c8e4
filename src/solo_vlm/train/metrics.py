"""Metrics of a run: live view, `metrics.jsonl`, and trackers."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from solo_vlm.evaluate.questions import Answer
from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.storage import Folder
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import write_text
from solo_vlm.utils.pages import thumbnail

logger = logging.getLogger(__name__)

_SHOWN = {  # metrics of the live view and their formats
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


class Tracker(Protocol):
    """Destination of metrics besides `metrics.jsonl`."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of a step."""

    def log_answers(self, name: str, answers: Sequence[Answer], step: int) -> None:
        """Log a table of answers to the questions of a file, with their images."""

    def finish(self) -> None:
        """Flush and close."""


class MetricsLogger:
    """Writer of metrics to `metrics.jsonl`, the trackers and the live view.

    Args:
        done: Steps done before a resume; later lines of `metrics.jsonl` are dropped.
    """

    def __init__(
        self, folder: Path, trackers: Sequence[Tracker], progress: Progress, total_steps: int, done: int
    ) -> None:
        truncate_after(folder / "metrics.jsonl", done)
        self._file = (folder / "metrics.jsonl").open("a", buffering=1)  # flushed after every line
        self._trackers = trackers
        self._progress = progress
        self._task = progress.add_task(
            folder.name, total=total_steps, completed=done, unit="step", metrics={}
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step; steps count from 1."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        for tracker in self._trackers:
            tracker.log(metrics, step)
        self._progress.update(self._task, metrics=metrics)

    def announce(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Advance the progress bar."""
        self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


class LiveView(Progress):
    """Progress bar per run, with the latest metrics of the current run below."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what rich draws."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if not task.finished and task.fields.get("metrics"):
                yield _metrics_table(task.fields["metrics"])


class ProgressLines(Progress):
    """Progress as plain lines, for output that is not a terminal.

    A line is printed when a task starts and finishes, and every `interval` seconds while it runs.
    """

    def __init__(self, console: Console, interval: float = 10.0) -> None:
        super().__init__(console=console, disable=True)
        self._interval = interval
        self._stopped = Event()
        self._thread = Thread(target=self._print_at_intervals, daemon=True)

    def start(self) -> None:
        """Start printing."""
        self._thread.start()

    def stop(self) -> None:
        """Stop printing."""
        self._stopped.set()
        self._thread.join()

    def add_task(self, *args: Any, **kwargs: Any) -> TaskID:
        """Add a task and print its first line."""
        task = super().add_task(*args, **kwargs)
        self._print(self._tasks[task])
        return task

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        """Update a task, and print its last line if that finishes it."""
        was_finished = self._tasks[task_id].finished
        super().update(task_id, **kwargs)
        if self._tasks[task_id].finished and not was_finished:
            self._print(self._tasks[task_id])

    def _print_at_intervals(self) -> None:
        while not self._stopped.wait(self._interval):
            for task in self.tasks:
                if not task.finished:
                    self._print(task)

    def _print(self, task: Task) -> None:
        total = "?" if task.total is None else f"{task.total:,.0f}"
        count = f"{task.fields.get('unit', '')} {task.completed:,.0f} of {total}".lstrip()
        parts = [f"{task.description}: {count}"]
        if "loss" in (metrics := task.fields.get("metrics") or {}):
            parts.append(f"loss {metrics['loss']:.4f}")
        if task.finished:
            parts.append(f"done in {timedelta(seconds=round(task.elapsed or 0))}")
        elif task.time_remaining is not None:
            parts.append(f"{timedelta(seconds=round(task.time_remaining))} left")
        self.console.print(", ".join(parts), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """Show progress on stderr, unless `quiet`: the live view on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    progress: Progress
    # FORCE_COLOR, which notebooks set, makes any file a terminal for rich.
    if quiet or (console.is_interactive and console.file.isatty()):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        progress = LiveView(*columns, console=console, disable=quiet)
    else:
        progress = ProgressLines(console)
    with progress:
        yield progress


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read all lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in 10^9 bytes: of the accelerator, or of this process on CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def first_start(folders: Sequence[Folder]) -> float:
    """Return when a run was first started, in seconds since the epoch; restarts do not change it.

    Args:
        folders: Folders of the run, some of which may be new.
    """
    name = "first_start"
    found = [text for folder in folders if (text := folder.find(name))]
    first = min(map(float, found), default=time.time())
    for folder in folders:
        if not folder.find(name):
            folder.write(name, f"{first}\n")
    return first


def slowest_process(context: DistributedContext) -> dict[str, float]:
    """Return the process with the slowest device, and its time relative to the median; a collective call.

    Processes wait for each other in every layer, so that a step takes equally long in all. Each one therefore
    times a matrix product of its own.
    """
    times = context.per_rank(_time_product(context.device))
    slowest = max(times)
    return {"slowest_rank": times.index(slowest), "slowest_ratio": slowest / median(times)}


def _time_product(device: torch.device) -> float:
    """Return the seconds of a matrix product, the shortest of several."""
    is_cpu = device.type == "cpu"
    matrix = torch.ones((256, 256) if is_cpu else (4096, 4096), device=device)
    matrix = matrix if is_cpu else matrix.bfloat16()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        if not is_cpu:
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def make_trackers(recipe: Recipe, folder: Path, done: int) -> list[Tracker]:
    """Create the trackers of a recipe; TensorBoard drops the steps after `done`, which a resume repeats."""
    return [
        _TensorBoard(folder, done) if name == "tensorboard" else _HostedTracker(name, recipe, folder)
        for name in recipe.trackers
    ]


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SoloError("trackers: pip install tensorboard, or set trackers=[]") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done)
        self._shown: set[tuple[str, str]] = set()  # images do not change from step to step

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_answers(self, name: str, answers: Sequence[Answer], step: int) -> None:
        self._writer.add_text(f"{name}/answers", _markdown(answers), step)
        for answer in answers:
            if answer.question.sample.images and (name, answer.question.id) not in self._shown:
                self._shown.add((name, answer.question.id))
                pixels = np.asarray(thumbnail(answer.question.image))
                self._writer.add_image(f"{name}/{answer.question.id}", pixels, step, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()


class _HostedTracker:
    """Tracker of Weights & Biases, or of Trackio, which has the same interface."""

    def __init__(self, name: str, recipe: Recipe, folder: Path) -> None:
        try:
            self._module: Any = import_module(name)
        except ImportError as error:
            raise SoloError(f"trackers: {name} is not installed; pip install {name}") from error
        options: dict[str, Any] = {"project": "solo-vlm", "name": folder.name, "resume": "allow"}
        if name == "wandb":  # Trackio resumes runs by name
            options["id"] = _run_id(folder / "wandb_id")
        self._module.init(config=recipe.model_dump(mode="json"), **options)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._module.log(metrics, step=step)

    def log_answers(self, name: str, answers: Sequence[Answer], step: int) -> None:
        if self._module.__name__ != "wandb":  # Trackio's tables have another interface
            return
        columns = ["id", "image", "question", "expected", "answer", "credit"]
        rows = [
            [
                answer.question.id,
                self._module.Image(thumbnail(answer.question.image))
                if answer.question.sample.images
                else None,
                *(answer.question.question, answer.question.expected, answer.response, answer.credit),
            ]
            for answer in answers
        ]
        self._module.log({f"{name}/answers": self._module.Table(columns=columns, data=rows)}, step=step)

    def finish(self) -> None:
        self._module.finish()


def _markdown(answers: Sequence[Answer]) -> str:
    """Return a Markdown table of answers, whose numbers are those of the images."""

    def cell(text: Any) -> str:
        return " ".join(str(text).replace("|", "\\|").split())

    rows = [
        (answer.question.id, answer.question.question, answer.question.expected, answer.response)
        for answer in answers
    ]
    marks = ["✓" if answer.credit == 1 else f"{answer.credit:.2g}" for answer in answers]
    lines = [f"| {' | '.join(map(cell, row))} | {mark} |" for row, mark in zip(rows, marks, strict=True)]
    return "\n".join(["| | question | expected | answer | credit |", "|---|---|---|---|---|", *lines])


def _run_id(path: Path) -> str:
    """Return the run's id, created on the first start and stored in the output directory."""
    if not path.is_file():
        write_text(path, uuid4().hex[:8])
    return path.read_text()


def _metrics_table(metrics: dict[str, float]) -> Table:
    shown = {name: form.format(metrics[name]) for name, form in _SHOWN.items() if name in metrics}
    shown |= {name: f"{value:.1%}" for name, value in metrics.items() if name.endswith("/accuracy")}
    table = Table.grid(*(Column(justify="right") for _ in shown), padding=(0, 2))
    table.add_row(*(name.replace("_", " ") for name in shown), style="dim")
    table.add_row(*shown.values())
    return table


def truncate_after(path: Path, step: int) -> None:
    """Drop lines after a step, which will be repeated, and from a damaged line on, with a warning."""
    if not path.is_file():
        return
    kept, last = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            last = json.loads(line)["step"]
            if last <= step:
                kept.append(f"{line.decode()}\n")
        except (ValueError, LookupError, TypeError):
            if last < step:  # as after a crash of the machine; a line after the step is repeated anyway
                logger.warning(
                    "%s is damaged from line %d on: metrics of steps %d to %d may be lost",
                    path,
                    number,
                    last + 1,
                    step,
                )
            break
    write_text(path, "".join(kept))
