"""lmms-eval's tasks, as its own files have them, on data that are here already."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmms_eval.tasks
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import ImageFile

from solo_vlm.evaluate.adapter import BackendModel
from solo_vlm.evaluate.benchmarks import Benchmark
from solo_vlm.evaluate.rows import EncodedRows, decoded
from solo_vlm.models.solo.image_loading_solo import ImageError

# lmms-eval makes Pillow fill up images that are cut off. Here such a row is a bad one, and says so.
ImageFile.LOAD_TRUNCATED_IMAGES = False

_NEEDS_A_JUDGE = {"mathvista"}
"""Benchmarks that lmms-eval scores by asking GPT. Without a key it guesses: it is not asked to score them."""


@dataclass(frozen=True)
class HarnessScores:
    """What lmms-eval makes of the answers.

    Attributes:
        scores: by metric, as lmms-eval gives them (some are shares, some are points).
        note: why there are none.
    """

    scores: Mapping[str, float]
    note: str = ""


class LocalTask(ConfigurableMessagesTask):
    """A task of lmms-eval: its prompts and its scores, on rows that are given.

    Images are decoded where the prompt is built, so that one that cannot be is its own row's failure.

    Args:
        benchmark: whose stock task it is.
        rows: with the columns of the data set that the stock task names.
    """

    def __init__(self, benchmark: Benchmark, rows: EncodedRows) -> None:
        self._rows = rows
        with _no_judge():
            config = load_yaml_config(str(_stock_file(benchmark.harness_task)), mode="full")
        self._split = config["test_split"]
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Called by the parent where it would load the data."""
        self.dataset = {self._split: self._rows}
        self.dataset_no_image = {self._split: self._rows.without_images()}

    def prompt(self, row: int) -> str:
        """The exact text of the prompt of a row, without its images."""
        return self.doc_to_text(self.dataset_no_image[self._split][row])

    def doc_to_visual(self, doc: Mapping[str, Any]) -> Any:
        """Images of a row, decoded.

        Raises:
            ImageError: one of them cannot be.
        """
        images = {name: decoded(value) for name, value in doc.items()}
        try:
            return super().doc_to_visual(images)
        except AttributeError as error:  # the stock functions convert whatever they find to RGB
            raise ImageError("the row has no image") from error


def ask_all(
    task: LocalTask, benchmark: Benchmark, model: BackendModel, limit: int | None = None
) -> HarnessScores:
    """Put every row of a task to a model, through lmms-eval.

    Args:
        task: to be run once.
        benchmark: the same.
        model: remembers its answers.
        limit: rows, from the first.

    Raises:
        SoloError: the engine cannot go on.
    """
    try:
        results = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            predict_only=benchmark.name in _NEEDS_A_JUDGE,
            cli_args=argparse.Namespace(process_with_media=False),
        )
    except Exception as error:
        if not model.finished:
            raise
        # Its scorers stumble over what is no whole benchmark, such as one question of a pair of MME.
        return HarnessScores({}, f"lmms-eval could not score this: {str(error) or type(error).__name__}")
    if benchmark.name in _NEEDS_A_JUDGE:
        return HarnessScores({}, "lmms-eval scores this task by asking GPT, so it was not asked to")
    return HarnessScores(dict(_plain_metrics(results["results"][benchmark.harness_task])))


@contextmanager
def _no_judge() -> Iterator[None]:
    """MathVista's functions make a client of OpenAI's as they are imported, and that fails without a key."""
    before = os.environ.get("API_TYPE")
    os.environ["API_TYPE"] = "dummy"
    try:
        yield
    finally:
        if before is None:
            del os.environ["API_TYPE"]
        else:
            os.environ["API_TYPE"] = before


def _stock_file(task: str) -> Path:
    (file,) = Path(lmms_eval.tasks.__file__).parent.glob(f"*/{task}.yaml")
    return file


def _plain_metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in results.items():
        metric, _, _ = key.partition(",")
        if isinstance(value, (int, float)) and "_stderr" not in metric:
            yield metric, float(value)
