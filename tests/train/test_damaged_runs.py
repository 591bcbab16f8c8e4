"""Runs whose folder a crash has left half done, or somebody has damaged."""

from __future__ import annotations

import shutil

import pytest

from small_run import images, run, settings, texts, write_data
from solo_vlm.errors import SoloError
from solo_vlm.train.checkpoint import read_progress
from tiny import make_solo


def test_a_run_with_adapters_ends_though_its_export_was_killed_between_adapter_and_model(tmp_path):
    write_data(tmp_path, images(4), texts(30))
    make_solo().save(tmp_path / "llama")
    plain = settings(tmp_path, tmp_path / "out", steps=3, global_batch=1, lora={"rank": 4, "alpha": 8})
    run(plain)
    shutil.rmtree(tmp_path / "out" / "model")
    run(plain)
    assert (tmp_path / "out" / "model" / "config.json").is_file()


@pytest.mark.parametrize("content", ["", "[]", '{"steps": 3, "unknown": 1}', None])
def test_a_damaged_training_state_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "training_state.json").write_text(content)
    with pytest.raises(SoloError, match=r"cannot go on from .*training_state.json"):
        read_progress(tmp_path)
