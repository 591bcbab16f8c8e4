"""Output directory: lock, changed recipes and inputs, manifest."""

from __future__ import annotations

import pytest
from tests.factories import (
    image_rows,
    locked_by_another_process,
    make_solo,
    run_recipe,
    run_settings,
    text_rows,
    write_training_data,
)

from solo_vlm.train import Recipe, train, trainer
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import lock_output_dir


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Return the settings of a run that was interrupted after a checkpoint."""
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
def test_resume_with_changed_model_or_validation_data_is_rejected(tmp_path, stopped, file):
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


def test_moved_run_resumes(tmp_path, stopped):
    (tmp_path / "out").rename(tmp_path / "moved")
    run_recipe({**stopped, "out": str(tmp_path / "moved")})
    assert (tmp_path / "moved" / "model" / "config.json").is_file()


def test_second_run_in_locked_output_dir_is_rejected(tmp_path):
    with (
        locked_by_another_process(tmp_path / "out"),
        pytest.raises(SoloError, match="another run is writing to"),
    ):
        lock_output_dir(tmp_path / "out")
    lock_output_dir(tmp_path / "out").close()


def test_resume_rejects_changed_recipe_but_allows_resumable_settings(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=4)
    train(Recipe.parse(plain))
    (tmp_path / "out" / "model").rename(tmp_path / "moved")
    with pytest.raises(SoloError, match=r"another recipe \(seed was 0, now 1\)"):
        train(Recipe.parse({**plain, "seed": 1}))
    changed = {
        **plain,
        "optimizer": {**plain["optimizer"], "learning_rate": 1e-3, "eps": 1e-6},
        "log_interval": 2,
    }
    changed["data"] = {**plain["data"], "sources": [plain["data"]["sources"][0], {"path": "text.parquet"}]}
    named = (
        r"data.sources\[1\].weight was 3.0, now 1.0; optimizer.learning_rate was 0.003, now 0.001; "
        r"optimizer.eps was 1e-08, now 1e-06\)"
    )
    with pytest.raises(SoloError, match=named):
        train(Recipe.parse(changed))
    train(Recipe.parse({**plain, "activation_checkpointing": "full", "log_interval": 2}))
    (tmp_path / "out" / "model").rename(tmp_path / "moved again")
    train(Recipe.parse({**plain, "data": {**plain["data"], "threads": 2}}))
