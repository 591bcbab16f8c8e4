"""Training for real, at the smallest size: it learns, it resumes bit for bit, it leaves a full record."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.factories import ask, make_llm, make_solo, png

from solo_vlm.data.collate import collate
from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.data.sources import open_source
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.load import load_model
from solo_vlm.train import Recipe, train, trainer
from solo_vlm.train.attention import use_packed_attention
from solo_vlm.train.manifest import read_recipe
from solo_vlm.train.optimizer import learning_rate, make_optimizer
from solo_vlm.train.recipe import OptimizerSettings
from solo_vlm.train.start import load_start
from solo_vlm.train.step import forward_backward, supervised_tokens
from solo_vlm.utils.errors import SoloError


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Two colours to name, some text, and a model to train."""
    folder = tmp_path_factory.mktemp("run")
    images = [{"bytes": png(Image.new("RGB", (32, 32), colour)), "path": None} for colour in ("red", "blue")]
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
        "log_every": 1,
        "data": {
            "sources": [{"path": "images.parquet", "weight": 4}, {"path": "text.parquet"}],
            "sequence_length": 64,
            "streams": 2,
            "packing_buffer": 4,
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "min_learning_rate": 1e-4},
        "checkpoint": {"every": 5, "keep": 1},
    }
    return Recipe.parse({**settings, **changes})


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_model_learns_to_name_what_it_sees(run_folder, tmp_path):
    trained = train(recipe(run_folder, tmp_path / "out", steps=60))
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.2 * curve[0]
    pipeline = GenerationPipeline.from_pretrained(trained.model)
    chats = [ask("what is this?", Image.new("RGB", (32, 32), colour)) for colour in ("red", "blue")]
    assert pipeline.answer(chats, max_new_tokens=5) == ["red", "blue"]
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def dies_after(steps, monkeypatch):
    """Let a run end by an exception after so many steps."""
    take_step = trainer.take_step
    taken = iter(range(1, steps + 1))

    def take_or_die(*arguments):
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(trainer, "take_step", take_or_die)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_goes_on_bit_for_bit(run_folder, tmp_path, monkeypatch, precision):
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


def test_a_manifest_repeats_its_run(run_folder, tmp_path):
    train(recipe(run_folder, tmp_path / "out", steps=3))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["packages"]["torch"] == torch.__version__
    assert len(manifest["data"]) == 2
    assert manifest["outcome"]["tokens"] == 3 * 2 * 64
    again = read_recipe(tmp_path / "out" / "manifest.json").override([f"out={tmp_path / 'again'}"])
    train(again)
    assert losses(tmp_path / "again") == losses(tmp_path / "out")


@pytest.fixture(scope="module")
def documents(run_folder):
    """Sixteen documents with and without images, and the model that reads them."""
    model, processor = load_start(run_folder / "start")
    encoder = Encoder(processor)
    rows = [
        row for name in ("images", "text") for row in open_source(str(run_folder / f"{name}.parquet")).read(0)
    ]
    return model, [encoder(parse_sample(row)) for row in rows * 2]


def test_the_loss_is_the_mean_over_all_supervised_tokens(documents):
    """Against each document by itself, all logits, and cross entropy by hand."""
    model, documents = documents
    model.set_attn_implementation("eager")
    model.eval()
    total = supervised = 0
    with torch.no_grad():
        for document in documents:
            ids, labels = torch.tensor(document.input_ids)[None], torch.tensor(document.labels)
            logits = model(input_ids=ids, pixel_values=torch.tensor(document.patches)).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            supervised += int((labels[1:] != -100).sum())
    use_packed_attention(model.train())
    batches = [collate(documents[:9], 512, 0), collate(documents[9:], 512, 0)]
    assert supervised_tokens(batches) == supervised
    losses = forward_backward(model, batches, supervised, nullcontext())
    assert math.isclose(sum(losses), total / supervised, rel_tol=1e-5)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_split_of_a_global_batch_changes_neither_loss_nor_gradient(documents, parts):
    model, documents = documents
    use_packed_attention(model.train())

    def gradient(parts):
        model.zero_grad()
        size = len(documents) // parts
        batches = [collate(documents[n : n + size], 512, 0) for n in range(0, len(documents), size)]
        losses = forward_backward(model, batches, supervised_tokens(batches), nullcontext())
        return sum(losses), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, whole = gradient(1)
    split_loss, split = gradient(parts)
    assert math.isclose(loss, split_loss, rel_tol=1e-5)
    assert (split - whole).norm() < 1e-5 * whole.norm()


def test_a_plain_llm_trains_on_text(run_folder, tmp_path):
    llm, tokenizer = make_llm()
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    data = {"sources": [{"path": "text.parquet"}], "sequence_length": 64, "streams": 2}
    trained = train(recipe(run_folder, tmp_path / "out", model=str(tmp_path / "llm"), data=data, steps=20))
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.5 * curve[0]
    assert (trained.model / "tokenizer.json").is_file()


def test_what_cannot_be_started_is_said(run_folder, tmp_path):
    with pytest.raises(SoloError, match="no data files"):
        train(recipe(run_folder, tmp_path / "a", data={"sources": [{"path": "nothing.parquet"}]}))
    with pytest.raises(SoloError, match="cannot read a model"):
        train(recipe(run_folder, tmp_path / "b", model=str(tmp_path)))
    with pytest.raises(SoloError, match="nothing to resume"):
        train(recipe(run_folder, tmp_path / "c"), resume=True)
    train(recipe(run_folder, tmp_path / "d", steps=1))
    with pytest.raises(SoloError, match="holds a finished run"):
        train(recipe(run_folder, tmp_path / "d", steps=1))


def test_a_loss_that_explodes_stops_the_run(run_folder, tmp_path):
    settings = {"learning_rate": 1e30, "warmup_steps": 0, "min_learning_rate": 0}
    with pytest.raises(SoloError, match="lower the rate"):
        train(recipe(run_folder, tmp_path / "out", optimizer=settings))


def test_the_schedule_is_warmup_and_cosine():
    settings = OptimizerSettings(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(step, 111, settings) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_norms_are_not_decayed_and_patches_have_their_rate():
    model = make_solo().model
    settings = OptimizerSettings(learning_rate=1e-3, patch_learning_rate=2e-4)
    groups = make_optimizer(model, settings).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert (group["weight_decay"] == 0.0) == all(p.ndim == 1 for p in group["params"])
    (patch,) = [group for group in groups if group["scale"] != 1.0]
    assert patch["scale"] == pytest.approx(0.2)
    assert patch["params"][0] is model.model.embed_vision_patch.weight
