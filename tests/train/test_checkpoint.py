"""Saving and loading checkpoints, and exporting models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tests.factories import (
    ProcessGroup,
    image_rows,
    make_solo,
    read_steps,
    run_recipe,
    run_settings,
    text_rows,
    write_training_data,
)
from torch.distributed.checkpoint.api import CheckpointException
from transformers import GenerationConfig

from solo_vlm.models.load import load_model
from solo_vlm.train import Recipe, train, trainer
from solo_vlm.train.checkpoint import (
    Checkpointer,
    TrainState,
    export_checkpoint,
    load_checkpoint,
    load_train_state,
)
from solo_vlm.train.model import load_base_model
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.parallel.context import init_distributed
from solo_vlm.train.storage import CheckpointStore, Folder
from solo_vlm.utils.errors import SoloError


def losses(out):
    return [line["loss"] for line in read_steps(out)]


def test_asynchronous_checkpoint_holds_state_at_time_of_save(runs, tmp_path):
    """Training continues while an asynchronous checkpoint is written."""
    recipe = Recipe.parse(run_settings(runs, tmp_path))
    model, _ = load_base_model(runs / "llama")
    optimizer = make_optimizer(model, recipe.optimizer)
    for state in optimizer.state.values():
        state["exp_avg"].normal_()
    expected = [p.clone() for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    with init_distributed(recipe) as context:
        checkpoints = Checkpointer(CheckpointStore(tmp_path), 2, True, context)
        checkpoints.save(model, optimizer, TrainState(step=3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
                optimizer.state[parameter]["exp_avg"].zero_()
        checkpoints.wait()
    load_checkpoint(Folder(tmp_path / "step-00000003"), model, optimizer)
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))
    found = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert all(torch.equal(f, m) for f, m in zip(found, moments, strict=True))


def test_parameters_unknown_to_optimizer_are_not_saved(runs, tmp_path):
    """Parameters unknown to the optimizer, as while FSDP has gathered them, would lack moments."""
    recipe = Recipe.parse(run_settings(runs, tmp_path))
    model, _ = load_base_model(runs / "llama")
    optimizer = make_optimizer(model, recipe.optimizer)
    name, parameter = next(iter(model.named_parameters()))
    owner = model.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(parameter.detach().bfloat16()))
    with init_distributed(recipe) as context:
        checkpoints = Checkpointer(CheckpointStore(tmp_path / "checkpoints"), 2, True, context)
        with pytest.raises(RuntimeError, match=f"optimizer does not hold the model's {name}"):
            checkpoints.save(model, optimizer, TrainState(step=3))
        parameter.requires_grad_(False)
        model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = parameter
        with pytest.raises(RuntimeError, match="1 parameters are not the model's"):
            checkpoints.save(model, optimizer, TrainState(step=3))
    assert not (tmp_path / "checkpoints").exists()


def test_failed_asynchronous_save_is_raised_at_next_step(runs, tmp_path, monkeypatch):
    plain = run_settings(runs, tmp_path / "out", steps=300)
    plain["checkpoint"] = {"save_interval": 2}

    def disk_is_full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", disk_is_full)
    with pytest.raises(CheckpointException, match="No space left"):
        train(Recipe.parse(plain))
    assert len(losses(tmp_path / "out")) < 100
    assert not list((tmp_path / "out" / "checkpoints").glob("step-*"))


def test_old_checkpoints_are_deleted_and_damaged_one_is_named(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=7)
    train(Recipe.parse(plain))
    checkpoints = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000006", "step-00000007"]
    for path in checkpoints.glob("step-00000006/*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SoloError, match="step-00000006"):
        load_checkpoint(Folder(checkpoints / "step-00000006"), load_base_model(runs / "llama")[0])


def test_export_checkpoint_writes_model_of_its_step(runs, tmp_path, monkeypatch):
    plain = run_settings(runs, tmp_path / "out", steps=7, checkpoint={"save_interval": 2, "keep": 3})
    after_four = {}
    optimizer_step = trainer.optimizer_step

    def watched(model, optimizer, *arguments):
        if optimizer.state[next(model.parameters())]["step"] == 4:
            after_four.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return optimizer_step(model, optimizer, *arguments)

    monkeypatch.setattr(trainer, "optimizer_step", watched)
    train(Recipe.parse(plain))
    assert export_checkpoint(tmp_path / "out", tmp_path / "exported", 4) == 4
    exported = dict(load_model(tmp_path / "exported").named_parameters())
    assert exported.keys() == after_four.keys()
    assert all(torch.equal(exported[name], after_four[name]) for name in exported)
    with pytest.raises(SoloError, match="there are steps 4, 6, 7"):
        export_checkpoint(tmp_path / "out", tmp_path / "again", 5)


def test_export_of_a_folder_without_a_run_is_rejected(tmp_path):
    with pytest.raises(SoloError, match="is not the output directory of a run"):
        export_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[]", '{"steps": 3, "unknown": 1}', None])
def test_damaged_training_state_is_rejected(tmp_path, content):
    if content is not None:
        (tmp_path / "training_state.json").write_text(content)
    with pytest.raises(SoloError, match=r"cannot resume from .*training_state.json"):
        load_train_state(Folder(tmp_path))


def test_export_killed_between_adapter_and_model_is_repeated(tmp_path):
    write_training_data(tmp_path, image_rows(4), text_rows(30))
    make_solo().save(tmp_path / "llama")
    plain = run_settings(tmp_path, tmp_path / "out", steps=3, global_batch=1, lora={"rank": 4, "alpha": 8})
    run_recipe(plain)
    shutil.rmtree(tmp_path / "out" / "model")
    run_recipe(plain)
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def forget(folder):
    """Make a folder like one of an older version: right padding and no EOS ids."""
    for name, changes in (
        ("tokenizer_config.json", {"padding_side": "right"}),
        ("generation_config.json", {"eos_token_id": None}),
    ):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}])
def test_sharded_export_keeps_generation_config_of_base_model(tmp_path, changes):
    write_training_data(tmp_path, image_rows(16), text_rows(40))
    solo = make_solo()
    solo.model.generation_config.eos_token_id = [2, solo.processor.tokenizer.eos_token_id]
    solo.save(tmp_path / "llama")
    plain = run_settings(tmp_path, tmp_path / "out", steps=2, **changes)
    assert ProcessGroup(2, run_recipe, plain).wait() == [0, 0]
    expected, actual = (
        GenerationConfig.from_pretrained(tmp_path / name).to_dict() for name in ("llama", "out/model")
    )
    assert expected["suppress_tokens"]
    assert actual == expected


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}])
def test_exported_models_pad_left_and_have_eos_token_ids(tmp_path, changes):
    write_training_data(tmp_path, image_rows(16), text_rows(40))
    solo = make_solo()
    solo.save(tmp_path / "llama")
    forget(tmp_path / "llama")
    train(Recipe.parse(run_settings(tmp_path, tmp_path / "out", steps=3, **changes)))
    export_checkpoint(tmp_path / "out", tmp_path / "exported")
    for folder in (tmp_path / "out/model", tmp_path / "exported"):
        assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "left"
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        assert ends == [solo.processor.tokenizer.eos_token_id]
