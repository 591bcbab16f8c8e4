"""LoRA and QLoRA: what is trained, what is written, and that both forms of it give the same answers."""

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
from tests.factories import ask, make_llm, make_solo, turn, write_chats

from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.load import load_model
from solo_vlm.train import Recipe, train
from solo_vlm.train.start import load_start

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_chats(folder)
    make_solo("mistral").save(folder / "base")
    return folder


def recipe(folder, out, **changes) -> Recipe:
    settings = {
        "root": str(folder),
        "model": "base",
        "out": str(out),
        "steps": 30,
        "global_batch": 2,
        "precision": "fp32",
        "log_every": 1,
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
def test_a_run_with_lora(folder, tmp_path, run, trainable):
    """It learns, only its parameters change, and adapter and merged model agree and answer."""
    settings = recipe(folder, tmp_path / "out", trainable=trainable, steps=40)
    trained = train(settings)
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.3 * curve[0]

    base, processor = load_start(folder / "base")
    before = base.state_dict()
    merged = load_model(trained.model)
    with_adapter = PeftModel.from_pretrained(load_start(folder / "base")[0], tmp_path / "out" / "adapter")
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


def test_targets_choose_layers(folder, tmp_path):
    train(recipe(folder, tmp_path / "out", steps=1, lora={**LORA, "targets": ["q_proj", "v_proj"]}))
    names = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names if "lora_A" in name} == {"q_proj", "v_proj"}


def test_lora_on_a_plain_llm(folder, tmp_path):
    llm, tokenizer = make_llm()
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    document = {"messages": [turn("assistant", "hello world")]}
    pq.write_table(pa.Table.from_pylist([document] * 8), tmp_path / "text.parquet")
    data = {"sources": [{"path": str(tmp_path / "text.parquet")}], "sequence_length": 64, "streams": 1}
    train(recipe(folder, tmp_path / "out", model=str(tmp_path / "llm"), data=data))
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes about kernels that a CPU lacks
def test_qlora_trains_over_4_bits(folder, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'solo-vlm[quantize]'")
    settings = recipe(folder, tmp_path / "out", quantize="nf4")
    held = load_start(settings.model_source(), settings)[0]
    layer = held.model.language_model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.dtype == torch.uint8
    assert held.lm_head.weight.dtype == held.model.embed_vision_patch.weight.dtype == torch.float32

    trained = train(settings)
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.3 * curve[0]
    merged = load_model(trained.model)  # of the base's own weights, not of 4 bits
    before = load_model(folder / "base").state_dict()
    assert torch.equal(merged.lm_head.weight, before["lm_head.weight"])
    assert merged.model.language_model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    answers = GenerationPipeline.from_pretrained(trained.model).answer(
        [ask("what is this?", Image.new("RGB", (64, 32), "blue"))]
    )
    assert answers[0].startswith("blue")


@pytest.mark.distributed
def test_two_processes_train_the_same_adapters(folder, tmp_path):
    file = folder / "recipe.yaml"
    settings = recipe(folder, "unused", trainable="new_tokens", steps=3)
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
