"""Tasks of lmms-eval with its prompts and scores: on the rows of a benchmark, or on its own data."""

from __future__ import annotations

import argparse
import io
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any, Never
from unittest.mock import patch

import datasets
import lmms_eval.tasks
import numpy as np
from lmms_eval.api.registry import get_aggregation
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

from solo_vlm.evaluate.benchmarks import BENCHMARKS
from solo_vlm.evaluate.data import EncodedRows, cast_images, decoded, files_of_split
from solo_vlm.evaluate.lmms_eval import BackendModel, chat_of
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.score import Benchmark, Part, Score, interval_of_mean
from solo_vlm.models.solo.image_loading_solo import ImageError
from solo_vlm.utils.errors import SoloError, did_you_mean, first_line

_SCORED_BY_GPT = {"mathvista", "hallusion_bench_image"}
"""Benchmarks that lmms-eval scores by asking GPT; without a key it waits or guesses, so it does not score."""

_API_CLIENTS = ("openai", "anthropic", "google", "requests", "httpx")
_RESAMPLES = 500
_MAX_SECONDS = 0.1  # of one aggregation; a slower one has no interval
_DRY_RESPONSE = "I cannot tell."


class TaskError(SoloError):
    """A task cannot be run or scored; others can."""


class StockTask(ConfigurableMessagesTask):
    """Task file of lmms-eval.

    Args:
        file: YAML file of the task.
        data: Folder with its data; None loads it as the file says, from the hub.

    Attributes:
        row_metrics: Metrics of each row that was scored, in order.
    """

    def __init__(self, file: Path, data: Path | None = None) -> None:
        self.file = file
        self.row_metrics: list[Mapping[str, Any]] = []
        self._data = data
        config = load_yaml_config(str(file), mode="full")
        if config.get("output_type", "generate_until") != "generate_until":
            raise TaskError(
                f"its output_type {config['output_type']} is not supported; only generate_until is"
            )
        super().__init__(config=config)

    @property
    def split(self) -> str:
        """Split whose rows are asked."""
        return self.config.test_split or self.config.validation_split

    def download(self, dataset_kwargs: Any = None) -> None:
        """Load the data, without the parent's five attempts and their pauses; datasets has its own."""
        if self._data is None:
            return ConfigurableTask.download.__wrapped__(self, dataset_kwargs)
        files = [str(file) for file in files_of_split(self._data, self.split)]
        rows = cast_images(datasets.load_dataset("parquet", data_files=files, split="train"))
        if self.config.process_docs is not None:
            rows = self.config.process_docs(rows)
        self.dataset = {self.split: rows}
        no_image = rows.remove_columns(EncodedRows(rows).image_columns)
        use_image = getattr(self.config, "process_results_use_image", False)
        self.dataset_no_image = {self.split: rows if use_image else no_image}

    def process_results(self, doc: Any, results: Any, full_docs: Any = None) -> Any:
        """Score a row, without the parent's five attempts, and keep its metrics."""
        metrics = ConfigurableTask.process_results.__wrapped__(self, doc, results, full_docs)
        self.row_metrics.append(metrics)
        return metrics

    def prompt(self, row: int) -> str:
        """Return the exact text of a row's prompt, without its images."""
        return str(self.doc_to_text(self.dataset_no_image[self.split][row]))

    def check(self) -> None:
        """Check before any response is generated that the first row can be asked and scored.

        Raises:
            TaskError: Its prompt cannot be built or has other parts than text and images, or its scorer calls
                an API or lacks a package.
        """
        try:
            chat_of(self.doc_to_messages(self.dataset[self.split][0]))
        except Exception as error:
            raise TaskError(_reason(error)) from error
        with tempfile.TemporaryDirectory() as folder, _without_network(), redirect_stdout(io.StringIO()):
            try:
                metrics = self.process_results(self.dataset_no_image[self.split][0], [_DRY_RESPONSE])
                for name, aggregate in self.aggregation().items():
                    if name in metrics:
                        _aggregated(aggregate, [metrics[name]], Path(folder))
            except ImportError as error:
                raise TaskError(_reason(error)) from error
            except Exception as error:
                # Others may only be due to the single row, such as one question of a pair.
                if type(error).__module__.partition(".")[0] in _API_CLIENTS:
                    raise TaskError(f"its scorer needs an API: {_reason(error)}") from error
        self.row_metrics.clear()


class LocalTask(StockTask):
    """Stock task for a benchmark on rows with its columns.

    Images are decoded when the prompt is built, so an unreadable image fails its own row only.
    """

    def __init__(self, benchmark: Benchmark, rows: EncodedRows) -> None:
        self._rows = rows
        (file,) = Path(lmms_eval.tasks.__file__).parent.glob(f"*/{benchmark.harness_task}.yaml")
        # MathVista's functions otherwise create an OpenAI client on import, which fails without a key.
        with patch.dict(os.environ, {"API_TYPE": "dummy"}):
            super().__init__(file)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Set the rows where the parent class would load the dataset."""
        self.dataset = {self.split: self._rows}
        self.dataset_no_image = {self.split: self._rows.without_images()}

    def doc_to_messages(self, doc: Mapping[str, Any], **rounds: Any) -> Any:
        """Return the messages of a row with its decoded images.

        Raises:
            ImageError: An image is missing or cannot be read.
        """
        images = {name: decoded(value) for name, value in doc.items()}
        try:
            return super().doc_to_messages(images, **rounds)
        except AttributeError as error:  # the stock functions convert any value to RGB
            raise ImageError("the row has no image") from error


# ------------------------------------------------------------------------------------------- task names


class TaskFiles:
    """Task files of lmms-eval, and those in a folder.

    Args:
        include_path: Folder of further task files, as lmms-eval's option of this name; they come first.

    Attributes:
        included: Kind, file and members of each task, group and tag in the folder.

    Raises:
        SoloError: The folder has no task files.
    """

    def __init__(self, include_path: Path | None = None) -> None:
        self.included: Mapping[str, Any] = {}
        if include_path is not None:
            folder = str(include_path)
            self.included = TaskManager(include_path=folder, include_defaults=False).task_index
            if not self.included:
                raise SoloError(f"--include-path {folder} has no task files (.yaml) of lmms-eval")

    def resolve(self, name: str) -> dict[str, Path]:
        """Return the task files of a task, or of each task of a group or tag, by task.

        Raises:
            SoloError: The name is unknown.
            TaskError: A task is not a YAML file, or changed by its group.
        """
        entry = self.included.get(name) or self._stock.get(name)
        if entry is None:
            known = [*BENCHMARKS, *self.included, *self._stock]
            raise SoloError(f"unknown task {name}{did_you_mean(name, known, 3)}")
        if entry["type"] == "task":
            return {name: Path(entry["yaml_path"])}
        if entry["type"] == "python_task":
            raise TaskError(f"{name} is a Python class, not a task file, which is not supported")
        members = entry["task"]
        if members == -1:  # listed in the file of the group
            members = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
        if changed := [str(member)[:80] for member in members if not isinstance(member, str)]:
            raise TaskError(f"the group {name} changes its tasks ({changed[0]}), which is not supported")
        return {task: file for member in members for task, file in self.resolve(member).items()}

    @cached_property
    def _stock(self) -> Mapping[str, Any]:
        return TaskManager().task_index  # reads two thousand files


def open_stock_task(name: str, file: Path, data_root: Path | None) -> StockTask:
    """Load a task of lmms-eval; from `data_root/NAME` if there is such a folder.

    Raises:
        TaskError: A package or its data is missing, it is not supported, or needs an API.
    """
    data = data_root / name if data_root is not None and (data_root / name).is_dir() else None
    try:
        task = StockTask(file, data)
    except Exception as error:
        raise TaskError(_reason(error)) from error
    task.check()
    return task


def _reason(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return f"a package is missing: {first_line(error)}"
    if isinstance(error, ImageError | SoloError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


# ---------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class HarnessResult:
    """Metrics of lmms-eval for the responses to a task."""

    metrics: Mapping[str, float] = field(default_factory=dict)  # in its units: some fractions, some points
    note: str = ""  # reason if there are none


def run_task(
    task: StockTask, model: BackendModel, folder: Path, limit: int | None = None, by_gpt: bool = False
) -> HarnessResult:
    """Generate responses to all rows of a task through lmms-eval; the model keeps them.

    Args:
        task: Task, which can be run once.
        model: Model that generates and keeps the responses.
        folder: Folder for files that the scorer may write, such as submissions.
        limit: Maximum number of rows, from the first.
        by_gpt: Whether lmms-eval's scorer is known to ask GPT, so that it is not run.

    Raises:
        SoloError: The backend fails.
        TaskError: lmms-eval cannot build a prompt.
    """
    try:
        with _without_network(lambda: model.finished), redirect_stdout(io.StringIO()):
            results = simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=TaskManager(include_defaults=False),
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                predict_only=by_gpt,
                process_docs_parallel=1,  # keeps `row_metrics` in order
                cli_args=argparse.Namespace(process_with_media=False, output_path=str(folder)),
            )
    except Exception as error:
        if not model.finished:
            raise (error if isinstance(error, SoloError) else TaskError(_reason(error))) from error
        # Its scorers fail on a partial benchmark, such as one question of a pair of MME.
        return HarnessResult(note=f"lmms-eval could not score this: {_reason(error)}")
    if by_gpt:
        return HarnessResult(note="lmms-eval scores this task by asking GPT, so its scorer did not run")
    return HarnessResult(_numbers(results["results"][task.config.task]))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers by name, or by "name (filter)" if there are several filters."""
    found = {
        tuple(key.split(",", 1)): float(value)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and "," in key and "_stderr" not in key
    }
    filters = {name for _, name in found}
    return {name if len(filters) == 1 else f"{name} ({by})": value for (name, by), value in found.items()}


def by_gpt(benchmark: Benchmark) -> bool:
    """Return whether lmms-eval scores a benchmark by asking GPT."""
    return benchmark.name in _SCORED_BY_GPT


@contextmanager
def _without_network(active: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Raise a `TaskError` that names the host after an attempt to connect: scorers go on without a judge."""
    called: list[str] = []
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def refuse(host: Any) -> Never:
        called.append(str(host))
        raise _ConnectionRefused

    def guarded_resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        return refuse(host) if active() else resolve(host, *arguments, **options)

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if active() and isinstance(address, tuple):  # not a Unix socket
            refuse(address[0])
        connect(self, address)

    try:
        with (
            patch.object(socket, "getaddrinfo", guarded_resolve),
            patch.object(socket.socket, "connect", guarded_connect),
        ):
            yield
    except _ConnectionRefused:
        pass
    if called:
        raise TaskError(
            f"its scorer connects to {called[0]}; tasks that need a judge or another API are not supported"
        )


class _ConnectionRefused(BaseException):
    """No Exception, which scorers would catch and retry."""


# ---------------------------------------------------------------------------------------------- scoring


def stock_score(
    task: StockTask, result: HarnessResult, predictions: Sequence[Prediction], rows: int
) -> Score:
    """Return lmms-eval's own score: its first metric, with all metrics as the breakdown.

    Raises:
        TaskError: It has no number as a metric.
    """
    if not result.metrics:
        raise TaskError(result.note or "it has no score: its answers are for a submission")
    parts = {name: _part(task, name, value) for name, value in result.metrics.items()}
    first, part = next(iter(parts.items()))
    return Score(
        task=task.config.task,
        title=task.config.task,
        score=part.score,
        interval=part.interval,
        n=len(predictions),
        expected_n=rows,
        metric=f"lmms-eval's {first}, in its units",
        source=f"lmms-eval {metadata.version('lmms_eval')}, {'/'.join(task.file.parts[-2:])}",
        breakdown=parts,
        bad_rows=tuple(prediction.id for prediction in predictions if prediction.response is None),
        maximum=None,
    )


def row_values(task: StockTask, rows: int) -> list[dict[str, float]]:
    """Return the metrics of each row that are numbers; none if the task has several values per row."""
    if len(task.row_metrics) != rows:  # several filters
        return [{} for _ in range(rows)]
    return [
        {name: float(value) for name, value in metrics.items() if isinstance(value, (bool, int, float))}
        for metrics in task.row_metrics
    ]


def _part(task: StockTask, key: str, value: float) -> Part:
    values = [metrics[key] for metrics in task.row_metrics if key in metrics]
    # With several filters, the key is not a metric's name.
    interval = _interval(task.aggregation()[key], values, value) if key in task.aggregation() else None
    return Part(value, len(values), interval, "metric", maximum=None)


def _interval(
    aggregate: Callable[..., Any], values: Sequence[Any], score: float
) -> tuple[float, float] | None:
    """Return the 95% interval of a metric under resampling of the rows, or None where it cannot be computed.

    That is so for a slow aggregation, and one that gives another score when it is called again.
    """
    if not values:
        return None
    if aggregate is get_aggregation("mean") and all(
        isinstance(value, (bool, int, float)) for value in values
    ):
        return interval_of_mean([float(value) for value in values])
    rng = np.random.default_rng(0)
    try:
        with tempfile.TemporaryDirectory() as folder, _without_network(), redirect_stdout(io.StringIO()):
            started = time.perf_counter()
            again = float(_aggregated(aggregate, values, Path(folder)))
            if again != score or time.perf_counter() - started > _MAX_SECONDS:
                return None
            samples = [
                float(_aggregated(aggregate, [values[row] for row in chosen], Path(folder)))
                for chosen in rng.integers(0, len(values), (_RESAMPLES, len(values)))
            ]
    except Exception:  # such as a resample without a category
        return None
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def _aggregated(aggregate: Callable[..., Any], values: Sequence[Any], folder: Path) -> Any:
    if "args" in signature(aggregate).parameters:
        return aggregate(list(values), args=argparse.Namespace(output_path=str(folder)))
    return aggregate(list(values))
