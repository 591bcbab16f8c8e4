"""Training steps, validation, stopping, and bit-exact resume."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import islice, pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tests.factories import (
    ask,
    image_rows,
    make_llm,
    make_solo,
    png,
    read_steps,
    run_settings,
    text_rows,
    write_training_data,
)

from solo_vlm.data.collate import collate, num_supervised_tokens
from solo_vlm.data.encode import Encoder
from solo_vlm.data.mixture import make_loader
from solo_vlm.data.sample import parse_sample
from solo_vlm.data.sources import open_source
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.load import load_model
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train import Recipe, checkpoint, train, trainer
from solo_vlm.train.model import load_base_model
from solo_vlm.train.optimizer import learning_rate, make_optimizer
from solo_vlm.train.recipe import OptimizerSettings
from solo_vlm.train.run_folder import read_manifest_recipe
from solo_vlm.train.trainer import forward_backward
from solo_vlm.utils.errors import SoloError


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Return a folder with images of two colors, some text, and a model."""
    folder = tmp_path_factory.mktemp("run")
    images = [{"bytes": png(Image.new("RGB", (32, 32), color)), "path": None} for color in ("red", "blue")]
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is this?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": name}]},
            ],
            "images": [images[number]],
        }
        for number, name in enumerate(("red", "blue"))
    ]
    texts = [{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "hello world"}]}]}]
    pq.write_table(pa.Table.from_pylist(rows * 8), folder / "images.parquet", row_group_size=4)
    pq.write_table(pa.Table.from_pylist(texts * 8), folder / "text.parquet", row_group_size=4)
    make_solo().save(folder / "start")
    return folder


def recipe(folder, out, **changes):
    settings = {
        "root": str(folder),
        "model": "start",
        "out": str(out),
        "steps": 12,
        "global_batch": 2,
        "precision": "fp32",
        "log_interval": 1,
        "data": {
            "sources": [{"path": "images.parquet", "weight": 4}, {"path": "text.parquet"}],
            "sequence_length": 64,
            "streams": 2,
            "packing_buffer": 4,
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "min_learning_rate": 1e-4},
        "checkpoint": {"save_interval": 5, "keep": 1},
    }
    return Recipe.parse({**settings, **changes})


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_model_learns_to_name_colors(run_folder, tmp_path):
    trained = train(recipe(run_folder, tmp_path / "out", steps=60))
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.2 * curve[0]
    pipeline = GenerationPipeline.from_pretrained(trained.model)
    chats = [ask("what is this?", Image.new("RGB", (32, 32), color)) for color in ("red", "blue")]
    assert pipeline.answer(chats, max_new_tokens=5) == ["red", "blue"]
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def dies_after(steps, monkeypatch):
    """Make a run raise after some steps."""
    optimizer_step = trainer.optimizer_step
    taken = iter(range(1, steps + 1))

    def take_or_die(*arguments):
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return optimizer_step(*arguments)

    monkeypatch.setattr(trainer, "optimizer_step", take_or_die)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_after_crash_is_bit_exact(run_folder, tmp_path, monkeypatch, precision):
    whole, cut = (recipe(run_folder, tmp_path / name, precision=precision) for name in ("whole", "cut"))
    train(whole)
    with monkeypatch.context() as patch:
        dies_after(8, patch)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert not (tmp_path / "cut" / "model").exists()
    train(cut, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    models = [load_model(tmp_path / name / "model").state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(
    ("family", "update"),
    [("qwen3_moe", 0), ("deepseek_v3", 0), ("deepseek_v3", 0.01), ("ernie4_5_moe", 0.01)],
)
def test_experts_resume_exactly_and_reload(run_folder, tmp_path, monkeypatch, family, update):
    """The routers of DeepSeek-V3 have a bias that is no parameter, those of Ernie one that is frozen."""
    start = make_solo(family)
    biases = {
        name: bias
        for name, bias in start.model.state_dict().items()
        if name.endswith("e_score_correction_bias")
    }
    for bias in biases.values():
        bias.copy_(torch.linspace(-0.3, 0.3, bias.numel()).view_as(bias))
    start.save(tmp_path / "start")
    validation = {"sources": [{"path": "images.parquet"}], "interval": 4, "sequences": 2}
    changes = {"model": str(tmp_path / "start"), "router_bias_update": update, "validation": validation}
    whole, cut = (recipe(run_folder, tmp_path / name, **changes) for name in ("whole", "cut"))
    trained = []
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer, "export_model", lambda *of: trained.append(of[1]) or checkpoint.export_model(*of)
        )
        exported = train(whole).model
    with monkeypatch.context() as patch:
        dies_after(8, patch)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    train(cut, resume=True)
    ours, theirs = (read_steps(tmp_path / name) for name in ("cut", "whole"))
    assert ("moe/aux_loss" in theirs[0]) == (family != "deepseek_v3")
    for key in {"loss", "validation_loss", *(name for name in theirs[0] if name.startswith("moe/"))}:
        assert [line.get(key) for line in ours] == [line.get(key) for line in theirs], key
    model, reloaded = trained[0].eval(), load_model(exported)
    model.set_attn_implementation(reloaded.config.text_config._attn_implementation)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
    state, saved = model.state_dict(), reloaded.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in state)
    assert biases or family == "qwen3_moe"
    assert all(torch.equal(saved[name], bias) == (update == 0) for name, bias in biases.items())


def test_manifest_reproduces_run(run_folder, tmp_path):
    train(recipe(run_folder, tmp_path / "out", steps=3))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["packages"]["torch"] == torch.__version__
    assert len(manifest["data"]) == 2
    assert manifest["outcome"]["tokens"] == 3 * 2 * 64
    again = read_manifest_recipe(tmp_path / "out" / "manifest.json").override([f"out={tmp_path / 'again'}"])
    train(again)
    assert losses(tmp_path / "again") == losses(tmp_path / "out")


@pytest.fixture(scope="module")
def documents(run_folder):
    """Return a model, and sixteen documents with and without images."""
    model, processor = load_base_model(run_folder / "start")
    encoder = Encoder(processor)
    rows = [
        row for name in ("images", "text") for row in open_source(str(run_folder / f"{name}.parquet")).read(0)
    ]
    return model, [encoder(parse_sample(row)) for row in rows * 2]


def test_loss_is_mean_over_supervised_tokens(documents):
    """The reference computes cross entropy from all logits of each document alone."""
    model, documents = documents
    model.set_attn_implementation("eager")
    model.eval()
    total = supervised = 0
    with torch.no_grad():
        for document in documents:
            ids, labels = torch.tensor(document.input_ids)[None], torch.tensor(document.labels)
            logits = model(input_ids=ids, pixel_values=torch.tensor(document.pixel_values)).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            supervised += int((labels[1:] != -100).sum())
    isolate_documents(model.train())
    batches = [collate(documents[:9], 512, 0), collate(documents[9:], 512, 0)]
    assert num_supervised_tokens(batches) == supervised
    losses = forward_backward(model, batches, supervised, nullcontext())
    assert math.isclose(sum(losses), total / supervised, rel_tol=1e-5)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_gradient_accumulation_keeps_loss_and_gradient(documents, parts):
    model, documents = documents
    isolate_documents(model.train())

    def gradient(parts):
        model.zero_grad()
        size = len(documents) // parts
        batches = [collate(documents[n : n + size], 512, 0) for n in range(0, len(documents), size)]
        losses = forward_backward(model, batches, num_supervised_tokens(batches), nullcontext())
        return sum(losses), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, whole = gradient(1)
    split_loss, split = gradient(parts)
    assert math.isclose(loss, split_loss, rel_tol=1e-5)
    assert (split - whole).norm() < 1e-5 * whole.norm()


def test_plain_llm_trains_on_text(run_folder, tmp_path):
    llm, tokenizer = make_llm()
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    data = {"sources": [{"path": "text.parquet"}], "sequence_length": 64, "streams": 2}
    trained = train(recipe(run_folder, tmp_path / "out", model=str(tmp_path / "llm"), data=data, steps=20))
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.5 * curve[0]
    assert (trained.model / "tokenizer.json").is_file()


def test_invalid_starts_are_rejected(run_folder, tmp_path):
    with pytest.raises(SoloError, match="no data files"):
        train(recipe(run_folder, tmp_path / "a", data={"sources": [{"path": "nothing.parquet"}]}))
    with pytest.raises(SoloError, match="cannot read a tokenizer"):
        train(recipe(run_folder, tmp_path / "b", model=str(tmp_path)))
    with pytest.raises(SoloError, match="nothing to resume"):
        train(recipe(run_folder, tmp_path / "c"), resume=True)
    train(recipe(run_folder, tmp_path / "d", steps=1))
    with pytest.raises(
        SoloError, match=r"holds a finished run of another recipe \(steps was 1, now 2\): remove"
    ):
        train(recipe(run_folder, tmp_path / "d", steps=2))
    (tmp_path / "d" / "manifest.json").unlink()
    with pytest.raises(SoloError, match="holds a model without the manifest of its run: remove"):
        train(recipe(run_folder, tmp_path / "d", steps=1))


@pytest.mark.parametrize("resume", [False, True])
def test_finished_run_returns_its_result_and_reads_nothing(tmp_path, resume, caplog):
    write_training_data(tmp_path, image_rows(4), text_rows(8))
    make_solo().save(tmp_path / "llama")
    settings = Recipe.parse(run_settings(tmp_path, tmp_path / "out", steps=2))
    first = train(settings)
    shutil.rmtree(tmp_path / "llama")
    (tmp_path / "text.parquet").unlink()
    assert train(settings, resume=resume) == first
    assert "holds the finished run of this recipe: nothing is left to do" in caplog.text
    assert len(read_steps(tmp_path / "out")) == 2


def test_exploding_loss_stops_run(run_folder, tmp_path):
    settings = {"learning_rate": 1e30, "warmup_steps": 0, "min_learning_rate": 0}
    with pytest.raises(SoloError, match="lower the rate"):
        train(recipe(run_folder, tmp_path / "out", optimizer=settings))


def test_learning_rate_is_warmup_and_cosine():
    settings = OptimizerSettings(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(step, 111, settings) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)  # halfway
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_norms_are_not_decayed_and_patches_have_their_own_rate():
    model = make_solo().model
    settings = OptimizerSettings(learning_rate=1e-3, patch_learning_rate=2e-4)
    groups = make_optimizer(model, settings).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert (group["weight_decay"] == 0.0) == all(p.ndim == 1 for p in group["params"])
    (patch,) = [group for group in groups if group["scale"] != 1.0]
    assert patch["scale"] == pytest.approx(0.2)
    assert patch["params"][0] is model.model.embed_vision_patch.weight


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops_run(runs, tmp_path, number):
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
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert f"saved after step {done}" in stderr.replace("\n", " ")
    assert done == len(losses(tmp_path / "stopped"))


def test_resume_after_stop_is_bit_exact(runs, tmp_path, monkeypatch):
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
def during_export(monkeypatch):
    """Return a function that sets what happens once the weights of the exported model are written."""

    def happen(action):
        def save(folder, *arguments, **options):
            save_model(folder, *arguments, **options)
            action()

        monkeypatch.setattr(checkpoint, "save_model", save)

    save_model = checkpoint.save_model
    return happen


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
def test_signal_during_the_final_export_lets_it_finish(runs, tmp_path, during_export, numbers):
    during_export(lambda: send(*numbers))
    train(Recipe.parse(run_settings(runs, tmp_path / "out", steps=3)))
    load_model(tmp_path / "out" / "model")
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_second_ctrl_c_ends_the_final_export_which_is_repeated(runs, tmp_path, during_export):
    recipe = Recipe.parse(run_settings(runs, tmp_path / "out", steps=3))
    during_export(lambda: send(signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert not list((tmp_path / "out").glob("*model*"))
    during_export(lambda: None)
    train(recipe)
    assert (tmp_path / "out" / "model").is_dir()


def test_full_disk_during_the_final_export_leaves_nothing_and_the_run_resumes(runs, tmp_path, during_export):
    recipe = Recipe.parse(run_settings(runs, tmp_path / "out", steps=3))

    def fill():
        raise OSError(errno.ENOSPC, "No space left on device")

    during_export(fill)
    with pytest.raises(SoloError, match=rf"cannot write {tmp_path}/out/model: No space left on device; free"):
        train(recipe)
    assert not list((tmp_path / "out").glob("*model*"))
    during_export(lambda: None)
    train(recipe)
    assert (tmp_path / "out" / "model").is_dir()


def test_second_run_during_the_final_export_is_rejected(runs, tmp_path, during_export):
    recipe = Recipe.parse(run_settings(runs, tmp_path / "out", steps=3))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "solo_vlm", "train", str(tmp_path / "recipe.yaml")]
    second = []
    during_export(lambda: second.append(subprocess.run(command, capture_output=True, text=True)))
    train(recipe)
    assert second[0].returncode == 2
    assert second[0].stderr.startswith(f"solo: another run is writing to {tmp_path}/out: wait for it")
    assert (tmp_path / "out" / "model").is_dir()


@pytest.fixture
def change_loaded(monkeypatch):
    """Return a function that changes models after loading, since files with NaN are rejected."""

    def apply(change):
        def changed(*arguments):
            model, processor = make_model(*arguments)
            change(model, processor)
            return model, processor

        make_model = trainer.make_model
        monkeypatch.setattr(trainer, "make_model", changed)

    return apply


@pytest.fixture
def poisoned(runs, tmp_path, change_loaded):
    """Return a folder with a model that outputs NaN for one rare word, and one sample with that word."""
    make_solo("mistral").save(tmp_path / "poisoned")

    def poison(model, processor):
        (word,) = processor.tokenizer.encode("seven", add_special_tokens=False)[:1]
        model.get_input_embeddings().weight.data[word] = float("nan")

    change_loaded(poison)
    rows = text_rows(63)
    rows.insert(37, {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "seven"}]}]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "text.parquet", row_group_size=8)
    pq.write_table(pa.Table.from_pylist(image_rows(24)), tmp_path / "images.parquet", row_group_size=4)
    return tmp_path


def test_nonfinite_step_is_skipped_and_its_samples_are_named(poisoned, caplog):
    plain = run_settings(poisoned, "out", model="poisoned", steps=None)
    plain["data"] |= {"epochs": 1, "sequence_length": 32}
    trained = train(Recipe.parse(plain))
    assert trained.metrics["skipped_steps"] == 1
    assert "text.parquet, row group 4, row 5" in caplog.text
    curve = losses(poisoned / "out")
    assert sum(loss != loss for loss in curve) == 1
    assert load_file(trained.model / "model.safetensors")["lm_head.weight"].isfinite().all()


def test_consecutive_nonfinite_steps_stop_run(runs, tmp_path, change_loaded):
    change_loaded(lambda model, processor: model.lm_head.weight.data.fill_(float("nan")))
    plain = run_settings(runs, tmp_path / "out", model="mistral", max_nonfinite=3)
    with pytest.raises(SoloError, match=r"step 3: loss nan.*3 steps in a row.*\n.*parquet") as caught:
        train(Recipe.parse(plain))
    assert "lower the rate" in str(caught.value)


def test_validation_loss_is_mean_over_first_held_out_sequences(runs, tmp_path):
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


def test_skipped_samples_are_listed_in_output_dir(runs, tmp_path):
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
