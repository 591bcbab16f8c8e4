"""Runs whose folder a crash has left half done, or somebody has damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from tests.factories import image_rows, make_solo, run_recipe, run_settings, text_rows, write_training_data

from solo_vlm.train import trainer
from solo_vlm.train.checkpoint import load_train_state
from solo_vlm.train.run_folder import lock_output_dir
from solo_vlm.utils.errors import SoloError


def test_a_run_with_adapters_ends_though_its_export_was_killed_between_adapter_and_model(tmp_path):
    write_training_data(tmp_path, image_rows(4), text_rows(30))
    make_solo().save(tmp_path / "llama")
    plain = run_settings(tmp_path, tmp_path / "out", steps=3, global_batch=1, lora={"rank": 4, "alpha": 8})
    run_recipe(plain)
    shutil.rmtree(tmp_path / "out" / "model")
    run_recipe(plain)
    assert (tmp_path / "out" / "model" / "config.json").is_file()


@pytest.mark.parametrize("content", ["", "[]", '{"steps": 3, "unknown": 1}', None])
def test_a_damaged_training_state_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "training_state.json").write_text(content)
    with pytest.raises(SoloError, match=r"cannot resume from .*training_state.json"):
        load_train_state(tmp_path)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Settings of a run that was interrupted after a checkpoint."""
    write_training_data(tmp_path, image_rows(4), text_rows(30))
    make_solo().save(tmp_path / "llama")
    (tmp_path / "held_out.parquet").write_bytes((tmp_path / "text.parquet").read_bytes())
    validation = {"sources": [{"path": "held_out.parquet"}], "interval": 2, "sequences": 2}
    plain = run_settings(tmp_path, tmp_path / "out", steps=6, global_batch=1, validation=validation)
    train_step = trainer.optimizer_step

    def interrupted(*arguments):
        if (tmp_path / "out" / "checkpoints" / "step-00000002").exists():
            raise KeyboardInterrupt
        return train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(plain)
    return plain


@pytest.mark.parametrize("file", ["llama/model.safetensors", "llama/tokenizer.json", "held_out.parquet"])
def test_resume_over_a_changed_model_or_validation_is_refused_by_name(tmp_path, stopped, file):
    content = (tmp_path / file).read_bytes()
    if file.endswith(".parquet"):
        write_training_data(tmp_path / "llama", image_rows(1), text_rows(9))
        (tmp_path / file).write_bytes((tmp_path / "llama" / "text.parquet").read_bytes())
    else:
        (tmp_path / file).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(SoloError, match=rf"{file} changed since the run in .* started: restore"):
        run_recipe(stopped)
    (tmp_path / file).write_bytes(content)
    run_recipe(stopped)
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_a_second_run_in_the_folder_of_a_running_one_is_refused(tmp_path):
    holder = "import sys; from pathlib import Path; from solo_vlm.train.run_folder import lock_output_dir\n"
    holder += "held = lock_output_dir(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SoloError, match="another run is writing to"):
            lock_output_dir(tmp_path / "out")
        other.kill()
    lock_output_dir(tmp_path / "out").close()
