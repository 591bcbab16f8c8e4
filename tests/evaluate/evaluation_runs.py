"""Benchmark files and a scripted backend for tests of evaluation runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tests.evaluate.benchmark_rows import TASKS, make_rows
from tests.factories import png

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.data import Rows, load_benchmark
from solo_vlm.generate import GenerationOutput, GenerationRequest


def noise(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Return a smooth image that differs between seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_data_root(folder: Path, tasks: Iterable[str] = TASKS) -> Path:
    """Write a parquet file of synthetic rows per task; every image is different."""
    seed = 0
    for task in tasks:
        rows = make_rows(task)
        for row in rows:
            column = {"mathvista": "decoded_image", "mmmu_val": "image_1"}.get(task, "image")
            seed += 1
            image = {"bytes": png(noise(seed)), "path": None}
            if isinstance(row[column], list):
                row[column] = [image] * len(row[column])
            elif row[column] is not None:
                row[column] = image
        write_rows(folder, task, rows)
    return folder


def write_rows(folder: Path, task: str, rows: list[dict]) -> None:
    path = folder / task / f"{get(task).split}.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def open_task(task: str, data_root: Path, cache: Path) -> Rows:
    """Load the rows of a task through a separate cache."""
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, cache
    try:
        return Rows.of(get(task), load_benchmark(get(task), data_root))
    finally:
        datasets.config.HF_DATASETS_CACHE = before


class ScriptedBackend:
    """Backend with scripted answers in batches of three, last row first, which records the requested rows."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers
        self.asked: list[int] = []

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[list[GenerationOutput]]:
        questions = sorted(requests, key=lambda question: -question.request_id)
        for start in range(0, len(questions), 3):
            batch = questions[start : start + 3]
            self.asked += [question.request_id for question in batch]
            yield [
                GenerationOutput(question.request_id, self.answers[question.request_id]) for question in batch
            ]
