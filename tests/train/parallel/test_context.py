"""Parallel dimensions, and checks that all processes agree."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from tests.factories import run_settings

from solo_vlm.data.sources import fingerprints
from solo_vlm.train.parallel.context import DistributedContext, ParallelDims, init_distributed
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError


def recipe(*overrides: str) -> Recipe:
    settings = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}}
    return Recipe.parse(settings).override(overrides)


def test_paper_recipe_accumulates_32_sequences():
    """Tensor parallel 2 x data parallel 4, 128 sequences per step."""
    assert ParallelDims.from_recipe(recipe("parallel.tensor=2"), 8) == ParallelDims(4, 2, 32)


def test_parameters_are_sharded_over_slices_and_within_copies():
    settings = recipe("parallel.tensor=2", "parallel.context=2", "parallel.replicate=4")
    dims = ParallelDims.from_recipe(settings, 64)
    assert dims == ParallelDims(16, 2, 8, cp=2, replicate=4)
    assert dims.shards == 8


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel.tensor=2"], 3, "a multiple of 2, or set parallel.tensor to one of 1 or 3"),
        (
            ["global_batch=10"],
            4,
            "global_batch = 10 is not divisible by 4 .*: set it to 8 or 12, or start 1 or 2 ",
        ),
        (["global_batch=10", "parallel.tensor=2"], 8, "set it to 8 or 12, or start 2 or 4 processes"),
        (["global_batch=2"], 3, "set it to 3, or start 1 or 2 processes"),
        (["parallel.tensor=2", "parallel.context=2"], 6, "groups of parallel.tensor x parallel.context = 4"),
        (["parallel.replicate=3"], 4, "3 does not divide 4 data-parallel groups: set it to one of 1, 2 or 4"),
        (["parallel.context=3"], 3, "sequence_length = 32768 is not divisible .*: set it to 32766 or 32769"),
        (["data.streams=10", "data.workers=3"], 2, "2 data-parallel groups x 3 workers: set it to 6 or 12"),
    ],
)
def test_indivisible_batch_is_rejected_with_suggestions(overrides, processes, message):
    with pytest.raises(SoloError, match=message):
        ParallelDims.from_recipe(recipe(*overrides), processes)


def test_process_with_other_data_files_is_rejected(runs, tmp_path, monkeypatch):
    """A file is missing on one of several machines without a shared file system."""
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(runs / "text.parquet", tmp_path / name / "0.parquet")
    shutil.copy(runs / "images.parquet", tmp_path / "first" / "1.parquet")
    first, other = (
        Recipe.parse(run_settings(tmp_path, "out", data={"sources": [{"path": name}]})).mixture.open_sources()
        for name in ("first", "other")
    )
    with init_distributed(Recipe.parse(run_settings(runs, "out"))) as alone:
        alone.check_same_data(first)
        monkeypatch.setattr(DistributedContext, "broadcast_from_rank0", lambda *_: fingerprints(first))
        with pytest.raises(SoloError, match=r"process 3 sees other files of source .* than process 0"):
            replace(alone, rank=3).check_same_data(other)
