"""Data that an ablation derives."""

from __future__ import annotations

from collections import Counter

import pytest

from solo_vlm.data.samples_file import write_samples
from solo_vlm.data.sources import open_source
from solo_vlm.experiments.ablations.data import prepare_data, shuffle_images
from solo_vlm.experiments.ablations.settings import Ablation
from solo_vlm.quickstart.data.samples import pretraining_sample
from solo_vlm.utils.errors import SoloError


def rows(path):
    source = open_source(path)
    return [row for unit in range(len(source)) for row in source.read(unit)]


def pictures(row):
    return [image["bytes"] for image in row["images"]]


def test_images_are_dealt_out_anew_and_nothing_else_changes(tmp_path, picture):
    samples = [pretraining_sample(f"number {n}", picture(8, 8, seed=n)) for n in range(40)]
    samples += [pretraining_sample(f"text {n}") for n in range(5)]
    both = pretraining_sample("two", picture(8, 8, seed=50))
    both["messages"][0]["content"].insert(0, {"type": "image"})
    both["images"] += pretraining_sample("", picture(8, 8, seed=51))["images"]
    write_samples(tmp_path / "in.parquet", [*samples, both])
    shuffle_images(tmp_path / "in.parquet", tmp_path / "out.parquet")
    before, after = rows(tmp_path / "in.parquet"), rows(tmp_path / "out.parquet")
    assert [row["messages"] for row in before] == [row["messages"] for row in after]
    assert Counter(i for row in before for i in pictures(row)) == Counter(
        i for row in after for i in pictures(row)
    )
    assert [len(pictures(row)) for row in before] == [len(pictures(row)) for row in after]
    kept = sum(pictures(old) == pictures(new) for old, new in zip(before[:40], after[:40], strict=True))
    assert kept < 6  # one is expected to stay
    assert pictures(before[-1]) == pictures(after[-1])


def test_the_same_seed_deals_alike(tmp_path, picture):
    write_samples(tmp_path / "in.parquet", [pretraining_sample(f"{n}", picture(8, 8, n)) for n in range(20)])
    dealt = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        shuffle_images(tmp_path / "in.parquet", tmp_path / f"{name}.parquet", seed)
        dealt.append([pictures(row) for row in rows(tmp_path / f"{name}.parquet")])
    assert dealt[0] == dealt[1] != dealt[2]


def test_toy_data_are_drawn_once_and_never_twice_differently(tmp_path):
    sizes = "{text: 20, stage1: 20, sft: 5, heldout_text: 4, heldout_digits: 2}"

    def prepare(drawn):
        prepare_data(Ablation.load("shuffled-labels", [f"root={tmp_path}", f"toy_data={drawn}"]).settings)

    prepare(sizes)
    data = tmp_path / "data"
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    files = ["heldout_digits", "heldout_text", "sft", "stage1", "stage1_shuffled", "text"]
    assert sorted(before) == [*(f"{name}.parquet" for name in files), "toy.json"]
    known = [row["messages"] for row in rows(data / "text.parquet")]
    assert all(row["messages"] not in known for row in rows(data / "heldout_text.parquet"))
    prepare(sizes)
    assert before == {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    with pytest.raises(SoloError, match="other toy data"):
        prepare(sizes.replace("20", "30"))
