"""Trainable parameters and adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tests.factories import ask, make_llm, make_solo, picture_chat, text_chat, turn, write_chats

from solo_vlm.check.tiny import tiny_llm
from solo_vlm.data.collate import collate
from solo_vlm.data.encode import encode
from solo_vlm.data.sample import parse_sample
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.from_llm import ImageDesign, compose
from solo_vlm.models.load import load_model
from solo_vlm.models.packed import attention
from solo_vlm.models.packed.groups import document_groups
from solo_vlm.train import Recipe, train
from solo_vlm.train.model import (
    adapter_state_dict,
    has_adapters,
    load_base_model,
    merge_adapter,
    set_trainable,
)
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.utils.errors import SoloError

PATCHES = "model.embed_vision_patch.weight"


EMBEDDING = "model.language_model.embed_tokens.weight"


HEAD = "lm_head.weight"


def recipe(**settings) -> Recipe:
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.5}
    data = {"sources": [{"path": "unused"}]}
    return Recipe.parse(
        {"model": "unused", "out": "unused", "data": data, "optimizer": optimizer, **settings}
    )


def take_steps(model, processor, settings, count=3) -> list[float]:
    documents = [encode(parse_sample(chat), processor) for chat in (picture_chat(2), text_chat())]
    batch = collate(documents, sum(map(len, documents)), pad_token_id=0)
    optimizer = make_optimizer(model, settings.optimizer)
    losses = []
    for _ in range(count):
        loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_training_patch_embedding_changes_nothing_else():
    solo = make_solo()
    before = weights(solo.model)
    set_trainable(solo.model, settings := recipe(trainable="patch_embedding"))
    take_steps(solo.model, solo.processor, settings)
    assert {name for name, value in weights(solo.model).items() if not torch.equal(value, before[name])} == {
        PATCHES
    }
    assert not has_adapters(solo.model)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])  # llama's and gemma's heads are tied
def test_training_new_tokens_changes_only_their_rows(family, tmp_path):
    solo = make_solo(family)
    before = weights(solo.model)
    set_trainable(solo.model, settings := recipe(trainable="new_tokens"))
    losses = take_steps(solo.model, solo.processor, settings)
    assert losses[-1] < losses[0]
    solo.model.save_pretrained(tmp_path, state_dict=adapter_state_dict(solo.model))
    merged = merge_adapter(make_solo(family).model, tmp_path)
    after = weights(merged)
    assert after.keys() == before.keys()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        PATCHES,
        EMBEDDING,
        HEAD,
    }
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == (family != "mistral")
    for table in (EMBEDDING, HEAD):
        changed = (after[table] != before[table]).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) == set(merged.config.vision_token_ids)


def test_trainable_all_trains_every_parameter():
    model = make_solo().model
    set_trainable(model, recipe())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{"trainable": "new_tokens"}, {"lora": {}}])
@pytest.mark.parametrize("family", ["llama", "phimoe"])  # routers of phimoe are linear layers
def test_new_adapters_keep_logits(family, settings):
    solo = make_solo(family)
    ids = torch.tensor([[5, 6, 7, solo.model.config.vision_start_token_id, 8]])
    before = solo.model(input_ids=ids).logits
    set_trainable(solo.model, recipe(**settings))
    assert torch.equal(solo.model.eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"quantize": "nf4"}, 1, "also set lora"),
        ({"quantize": "nf4", "lora": {}}, 2, "cannot be sharded"),
        ({"quantize": "nf4", "lora": {}, "float8": True}, 1, "unset quantize or float8"),
        ({"lora": {}, "parallel": {"tensor": 2}}, 2, "set parallel.tensor to 1"),
        ({"lora": {"targets": ["q_proj", "no_such"]}}, 1, "no linear layer no_such; it has down_proj, "),
    ],
)
def test_contradicting_settings_are_rejected(settings, processes, message):
    with pytest.raises(SoloError, match=message):
        set_trainable(make_solo().model, recipe(**settings), processes)


@pytest.mark.parametrize("trainable", ["patch_embedding", "new_tokens"])
def test_partial_training_of_plain_llm_is_rejected(trainable):
    with pytest.raises(SoloError, match="solo init"):
        set_trainable(make_llm()[0], recipe(trainable=trainable))


LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_chats(folder)
    make_solo("mistral").save(folder / "base")
    return folder


def lora_recipe(folder, out, **changes) -> Recipe:
    settings = {
        "root": str(folder),
        "model": "base",
        "out": str(out),
        "steps": 30,
        "global_batch": 2,
        "precision": "fp32",
        "log_interval": 1,
        "lora": LORA,
        "data": {
            "sources": [{"path": "chats.parquet"}],
            "sequence_length": 96,
            "streams": 2,
            "packing_buffer": 4,
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "min_learning_rate": 1e-3},
    }
    return Recipe.parse({**settings, **changes})


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def logits(model, processor) -> torch.Tensor:
    inputs = GenerationPipeline(model.eval(), processor).encode(
        [ask("what is this?", Image.new("RGB", (64, 32), "red"))]
    )
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("trainable", ["all", "new_tokens"])
def test_lora_run_trains_and_merged_model_matches_adapter(folder, tmp_path, run, trainable):
    """The run learns, only its parameters change, and adapter and merged model agree."""
    settings = lora_recipe(folder, tmp_path / "out", trainable=trainable, steps=40)
    trained = train(settings)
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.3 * curve[0]

    base, processor = load_base_model(folder / "base")
    before = base.state_dict()
    merged = load_model(trained.model)
    with_adapter = PeftModel.from_pretrained(
        load_base_model(folder / "base")[0], tmp_path / "out" / "adapter"
    )
    expected = logits(with_adapter, processor)
    assert torch.allclose(logits(merged, processor), expected, atol=1e-4)
    assert not torch.allclose(logits(base, processor), expected, atol=1e-1)

    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for name, weight in merged.state_dict().items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:
            change = adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"] * LORA["alpha"] / LORA["rank"]
            assert torch.allclose(weight, before[name] + change, atol=1e-5)
        elif "norm" in name or (trainable == "all" and "embed_vision_patch" not in name):
            assert torch.equal(weight, before[name])
    layers = merged.config.text_config.num_hidden_layers
    assert len(adapter) == 2 * 7 * layers + 1 + 2 * (trainable == "new_tokens")

    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    code, out, _ = run(
        *("generate", "--model", trained.model, "--image", tmp_path / "red.png"),
        *("--prompt", "what is this?", "--json"),
    )
    assert code == 0
    assert json.loads(out)["answer"].startswith("red")


DESIGN = ImageDesign("bidirectional", "2d", 10000.0, "conv")


@pytest.mark.parametrize("lora", [None, LORA])
def test_model_of_another_design_trains_and_reloads(folder, tmp_path, lora):
    if not (folder / "designed").exists():
        compose(*make_llm("mistral"), design=DESIGN).save(folder / "designed")
    changes = {"model": "designed", "lora": lora, "activation_checkpointing": "full"}
    trained = train(lora_recipe(folder, tmp_path / "out", **changes))
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.5 * curve[0]
    model = load_model(trained.model)
    assert not model.config.is_paper_design
    before = load_model(folder / "designed").state_dict()
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert {name for name in before if "embed_vision_patch" in name} <= set(changed)
    answers = GenerationPipeline.from_pretrained(trained.model).answer(
        [ask("what is this?", Image.new("RGB", (64, 32), color)) for color in ("red", "blue")]
    )
    assert [answer.split()[0] for answer in answers] == ["red", "blue"]


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_two_processes_train_another_design_as_one(folder, tmp_path, tensor):
    if not (folder / "designed").exists():
        compose(*make_llm("mistral"), design=DESIGN).save(folder / "designed")
    file = folder / "designed.yaml"
    settings = lora_recipe(folder, "unused", model="designed", lora=None, steps=3)
    file.write_text(json.dumps(settings.model_dump(mode="json")))
    for processes in (1, 2):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", "solo_vlm", "train"),
            *(str(file), f"out={tmp_path / str(processes)}"),
            f"parallel.tensor={tensor if processes == 2 else 1}",
        ]
        subprocess.run(command, check=True, timeout=300)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


@pytest.mark.parametrize("lora", [None, LORA])
def test_run_whose_packing_would_leak_is_rejected(folder, tmp_path, run, monkeypatch, lora):
    """Whether adapters or all weights are trained; nothing but the message reaches the user."""
    monkeypatch.setattr(attention, "document_groups", one_document)
    settings = {**lora_recipe(folder, tmp_path / "out").model_dump(), "lora": lora}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings, default=str))
    code, _, err = run("train", tmp_path / "recipe.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "packed training would be wrong for mistral: document 2 of 3 differs from layer 0" in err
    assert f"solo check {folder / 'base'}" in err


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("gpt2", "n_positions"),
        ("gptj", "n_positions"),
        ("opt", "max_position_embeddings"),
        ("mpt", "max_seq_len"),
    ],
)
def test_sequences_longer_than_a_table_of_positions_are_rejected(family, positions, folder, tmp_path):
    solo = make_solo(family, **{positions: 64})
    solo.save(tmp_path / "base")
    settings = lora_recipe(folder, tmp_path / "out", model=str(tmp_path / "base"), lora=None, steps=1)
    data = settings.data.model_copy(update={"sequence_length": 65})
    with pytest.raises(
        SoloError, match=f"sequence_length = 65: this {family} has positions for 64 tokens; set it"
    ):
        train(settings.model_copy(update={"data": data}))


def test_sequences_may_be_longer_than_the_context_of_rope(folder, tmp_path):
    make_solo("mistral", max_position_embeddings=64).save(tmp_path / "base")
    settings = lora_recipe(folder, tmp_path / "out", model=str(tmp_path / "base"), lora=None, steps=1)
    assert settings.data.sequence_length > 64
    train(settings)


def one_document(bounds):
    """Group all documents of a row as one."""
    return document_groups(bounds[[0, -1]])


def test_lora_targets_select_layers(folder, tmp_path):
    train(lora_recipe(folder, tmp_path / "out", steps=1, lora={**LORA, "targets": ["q_proj", "v_proj"]}))
    names = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names if "lora_A" in name} == {"q_proj", "v_proj"}


def test_lora_on_a_plain_llm(folder, tmp_path):
    llm, tokenizer = make_llm()
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    document = {"messages": [turn("assistant", "hello world")]}
    pq.write_table(pa.Table.from_pylist([document] * 8), tmp_path / "text.parquet")
    data = {"sources": [{"path": str(tmp_path / "text.parquet")}], "sequence_length": 64, "streams": 1}
    train(lora_recipe(folder, tmp_path / "out", model=str(tmp_path / "llm"), data=data))
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes warns of missing CPU kernels
def test_qlora_trains_adapters_over_4_bit_weights(folder, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'solo-vlm[quantize]'")
    settings = lora_recipe(folder, tmp_path / "out", quantize="nf4")
    held = load_base_model(settings.mixture.model_source(), settings)[0]
    layer = held.model.language_model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    assert held.lm_head.weight.dtype == held.model.embed_vision_patch.weight.dtype == torch.float32

    trained = train(settings)
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.3 * curve[0]
    merged = load_model(trained.model)  # merged into the base's original weights, not into 4-bit ones
    before = load_model(folder / "base").state_dict()
    assert torch.equal(merged.lm_head.weight, before["lm_head.weight"])
    assert merged.model.language_model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    answers = GenerationPipeline.from_pretrained(trained.model).answer(
        [ask("what is this?", Image.new("RGB", (64, 32), "blue"))]
    )
    assert answers[0].startswith("blue")


@pytest.mark.distributed
def test_two_processes_train_the_same_adapters_as_one(folder, tmp_path):
    file = folder / "recipe.yaml"
    settings = lora_recipe(folder, "unused", trainable="new_tokens", steps=3)
    file.write_text(json.dumps(settings.model_dump(mode="json")))
    for processes in (1, 2):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", "solo_vlm", "train"),
            *(str(file), f"out={tmp_path / str(processes)}"),
        ]
        subprocess.run(command, check=True, timeout=300)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "12")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_z_loss_that_counts_padding_is_rejected():
    model = tiny_llm("bamba", z_loss_coefficient=1e-4)
    with pytest.raises(SoloError, match=r"z_loss_coefficient = 0.0001: the z-loss of bamba .* set it to 0"):
        set_trainable(model, recipe())
