"""What the engine does besides stepping: saving, stopping, skipping, validating, exporting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tests.factories import image_rows, make_solo, read_steps, run_settings, text_rows
from torch.distributed.checkpoint.api import CheckpointException

from solo_vlm.data.encode import Encoder
from solo_vlm.data.mixture import make_loader
from solo_vlm.models.load import load_model
from solo_vlm.train import Recipe, train, trainer
from solo_vlm.train.checkpoint import Checkpointer, TrainState, export_checkpoint, load_checkpoint
from solo_vlm.train.model import load_base_model
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.parallel.context import init_distributed
from solo_vlm.utils.errors import SoloError


def losses(out):
    return [line["loss"] for line in read_steps(out)]


def test_what_is_saved_is_what_was_there_when_it_was_saved(runs, tmp_path):
    """Training goes on while an asynchronous checkpoint is written."""
    recipe = Recipe.parse(run_settings(runs, tmp_path))
    model, _ = load_base_model(runs / "llama")
    optimizer = make_optimizer(model, recipe.optimizer)
    for state in optimizer.state.values():
        state["exp_avg"].normal_()
    expected = [p.clone() for p in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    with init_distributed(recipe) as context:
        checkpoints = Checkpointer(tmp_path, 2, True, context)
        checkpoints.save(model, optimizer, TrainState(step=3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
                optimizer.state[parameter]["exp_avg"].zero_()
        checkpoints.wait()
    load_checkpoint(tmp_path / "step-00000003", model, optimizer)
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))
    found = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert all(torch.equal(f, m) for f, m in zip(found, moments, strict=True))


def test_only_what_the_optimizer_holds_is_saved(runs, tmp_path):
    """Another parameter, as there is while FSDP has gathered it, would be saved without its moments."""
    recipe = Recipe.parse(run_settings(runs, tmp_path))
    model, _ = load_base_model(runs / "llama")
    optimizer = make_optimizer(model, recipe.optimizer)
    name, parameter = next(iter(model.named_parameters()))
    owner = model.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(parameter.detach().bfloat16()))
    with init_distributed(recipe) as context:
        checkpoints = Checkpointer(tmp_path / "checkpoints", 2, True, context)
        with pytest.raises(RuntimeError, match=f"optimizer does not hold the model's {name}"):
            checkpoints.save(model, optimizer, TrainState(step=3))
        parameter.requires_grad_(False)
        model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = parameter
        with pytest.raises(RuntimeError, match="1 parameters are not the model's"):
            checkpoints.save(model, optimizer, TrainState(step=3))
    assert not (tmp_path / "checkpoints").exists()


def test_a_failed_save_is_raised_at_the_next_step(runs, tmp_path, monkeypatch):
    plain = run_settings(runs, tmp_path / "out", steps=300)
    plain["checkpoint"] = {"save_interval": 2}

    def disk_is_full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", disk_is_full)
    with pytest.raises(CheckpointException, match="No space left"):
        train(Recipe.parse(plain))
    assert len(losses(tmp_path / "out")) < 100
    assert not list((tmp_path / "out" / "checkpoints").glob("step-*"))


def test_old_checkpoints_go_and_a_damaged_one_is_named(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=7)
    train(Recipe.parse(plain))
    checkpoints = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]
    for path in checkpoints.glob("step-00000006/*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SoloError, match="step-00000006"):
        load_checkpoint(checkpoints / "step-00000006", load_base_model(runs / "llama")[0])


def test_a_checkpoint_becomes_a_model_folder(runs, tmp_path, monkeypatch):
    plain = run_settings(runs, tmp_path / "out", steps=7)
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
    with pytest.raises(SoloError, match="there are steps 4, 6"):
        export_checkpoint(tmp_path / "out", tmp_path / "again", 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(runs, tmp_path, number):
    plain = run_settings(runs, tmp_path / "stopped", steps=300)
    plain["checkpoint"] = {"save_interval": 1000}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    command = [sys.executable, "-m", "solo_vlm", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = tmp_path / "stopped" / "metrics.jsonl"
    while not lines.exists() or len(lines.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert f"saved after step {done}" in said.replace("\n", " ")
    assert done == len(losses(tmp_path / "stopped"))


def test_a_stopped_run_goes_on_bit_for_bit(runs, tmp_path, monkeypatch):
    whole, stopped = (
        Recipe.parse(run_settings(runs, tmp_path / name, steps=9)) for name in ("whole", "stopped")
    )
    train(whole)
    optimizer_step = trainer.optimizer_step

    def asks_to_stop(model, optimizer, *arguments):
        if optimizer.state[next(model.parameters())]["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimizer_step(model, optimizer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", asks_to_stop)
        with pytest.raises(SoloError, match="saved after step 5"):
            train(stopped)
    train(stopped)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.fixture
def poisoned(runs, tmp_path):
    """A model that answers one rare word with NaN, and one sample that has it."""
    solo = make_solo("mistral")
    (word,) = solo.processor.tokenizer.encode("seven", add_special_tokens=False)[:1]
    solo.model.get_input_embeddings().weight.data[word] = float("nan")
    solo.save(tmp_path / "poisoned")
    rows = text_rows(63)
    rows.insert(37, {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "seven"}]}]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "text.parquet", row_group_size=8)
    pq.write_table(pa.Table.from_pylist(image_rows(24)), tmp_path / "images.parquet", row_group_size=4)
    return tmp_path


def test_a_step_that_is_not_finite_is_skipped_and_its_samples_are_named(poisoned, caplog):
    plain = run_settings(poisoned, "out", model="poisoned", steps=None)
    plain["data"] |= {"epochs": 1, "sequence_length": 32}
    trained = train(Recipe.parse(plain))
    assert trained.metrics["skipped_steps"] == 1
    assert "text.parquet, row group 4, row 5" in caplog.text
    curve = losses(poisoned / "out")
    assert sum(loss != loss for loss in curve) == 1
    weights = load_model(trained.model).lm_head.weight
    assert weights.isfinite().all()


def test_steps_in_a_row_that_are_not_finite_stop_the_run(runs, tmp_path):
    solo = make_solo("mistral")
    solo.model.lm_head.weight.data.fill_(float("nan"))
    solo.save(tmp_path / "broken")
    plain = run_settings(runs, tmp_path / "out", model=str(tmp_path / "broken"), max_nonfinite=3)
    with pytest.raises(SoloError, match=r"step 3: loss nan.*3 steps in a row.*\n.*parquet") as caught:
        train(Recipe.parse(plain))
    assert "lower the rate" in str(caught.value)


def test_validation_is_the_mean_loss_of_the_first_held_out_sequences(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=5)
    plain["validation"] = {"sources": [{"path": "images.parquet"}], "interval": 2, "sequences": 3}
    trained = train(Recipe.parse(plain))
    lines = {line["step"]: line for line in read_steps(tmp_path / "out")}
    assert [step for step, line in lines.items() if "validation_loss" in line] == [2, 4, 5]

    held_out = {**plain["data"], "sources": [{"path": "images.parquet"}], "epochs": 1, "streams": 1}
    recipe = Recipe.parse({**plain, "data": held_out})
    model, processor = load_base_model(trained.model)
    model.eval()
    total = count = 0
    for batch in islice(make_loader(recipe.mixture, processor, recipe.mixture.open_sources()), 3):
        labels = batch["labels"][0]
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "pixel_values")}
            logits = model(**inputs).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    assert lines[5]["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_figures_of_a_step_are_counted_right(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=2)
    train(Recipe.parse(plain))
    recipe = Recipe.parse(plain)
    _, processor = load_base_model(runs / "llama")
    batches = list(islice(make_loader(recipe.mixture, processor, recipe.mixture.open_sources()), 4))
    line = read_steps(tmp_path / "out")[0]
    ids = torch.cat([batch["input_ids"][0] for batch in batches])
    bos, vision = processor.tokenizer.bos_token_id, torch.tensor(Encoder(processor).vision_ids)
    assert line["documents"] == int((ids == bos).sum())
    assert line["vision_tokens"] == int(torch.isin(ids, vision).sum())
    assert line["supervised_tokens"] == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    # A document ends with a supervised token, padding does not.
    padding = sum(int(b["cu_seq_lens_q"].diff()[-1]) for b in batches if b["labels"][0, -1] == -100)
    assert line["text_tokens"] + line["vision_tokens"] == 4 * 64 - padding
    assert line["fill"] == pytest.approx((4 * 64 - padding) / (4 * 64))


def test_a_curve_cut_in_the_middle_of_a_line_is_mended(runs, tmp_path, monkeypatch):
    plain = run_settings(runs, tmp_path / "out", steps=6)
    whole = run_settings(runs, tmp_path / "whole", steps=6)
    train(Recipe.parse(whole))
    optimizer_step = trainer.optimizer_step

    def dies(model, optimizer, *arguments):
        if optimizer.state[next(model.parameters())]["step"] == 5:
            raise KeyboardInterrupt
        return optimizer_step(model, optimizer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(Recipe.parse(plain))
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(Recipe.parse(plain))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_another_recipe_is_refused_but_another_layout_is_not(runs, tmp_path):
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


def test_a_tracker_that_is_not_installed_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SoloError, match="pip install wandb"):
        train(Recipe.parse(run_settings(runs, tmp_path / "out", trackers=["wandb"])))


def test_skipped_samples_are_listed_in_the_run(runs, tmp_path):
    rows = image_rows(8)
    rows[5]["images"][0]["bytes"] = b"not an image"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet", row_group_size=3)
    plain = run_settings(tmp_path, "out", model=str(runs / "llama"), steps=None)
    plain["data"] |= {"sources": [{"path": "images.parquet"}], "epochs": 1}
    train(Recipe.parse(plain))
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert entry["reason"] == "image"
    assert "images.parquet" in entry["where"]
    counted = [
        count for name, count in read_steps(tmp_path / "out")[-1].items() if name.startswith("skipped/")
    ]
    assert counted == [1]
