from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from tests.factories import run_settings

from solo_vlm.data.sources import fingerprints
from solo_vlm.train import Recipe
from solo_vlm.train.parallel.context import DistributedContext, init_distributed
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import describe_changes, find_changes


def test_changes_are_named_down_to_the_single_value():
    before = {"a": 1, "b": {"c": 2, "same": 0}, "d": [{"w": 1}, {"w": 2}], "e": None, "f": [1]}
    now = {"a": 1, "b": {"c": 3, "same": 0}, "d": [{"w": 1}, {"w": 5}], "e": {"r": 4}, "f": [1, 2]}
    assert find_changes(before, now) == {
        "b.c": (2, 3),
        "d[1].w": (2, 5),
        "e": (None, {"r": 4}),
        "f": ([1], [1, 2]),
    }
    assert find_changes(now, now) == {}


def test_first_changes_are_described():
    assert describe_changes({"seed": (0, 1)}) == "seed was 0, now 1"
    changed = dict.fromkeys("abcde", (0, 1))
    assert describe_changes(changed) == "a was 0, now 1; b was 0, now 1; c was 0, now 1; and 2 more"


def test_process_that_sees_other_files_is_refused(runs, tmp_path, monkeypatch):
    """Machines without a common file system, on one of which a file was not copied."""
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
