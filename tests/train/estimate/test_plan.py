"""Plans: memory against PyTorch's, steps against the streams'."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tests.factories import LLM_CONFIGS, make_solo
from tests.train.estimate.test_layout import saved_bytes
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig

from solo_vlm.check.tiny import tiny_config
from solo_vlm.data.encode import Encoder
from solo_vlm.data.sources import open_source
from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.data.streams import MixtureItem, VirtualStream
from solo_vlm.models.flops import ModelShape, count_parameters, training_flops
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.quickstart.data.samples import pretraining_sample
from solo_vlm.train.activation_checkpointing import LayerModes, prepare_layers
from solo_vlm.train.estimate.data import estimate_data
from solo_vlm.train.estimate.layout import Layout
from solo_vlm.train.estimate.memory import (
    find_device,
    kept_activations,
    memory_per_device,
    peak_activations,
    plan_layout,
    recognize_device,
    trained_parameters,
)
from solo_vlm.train.estimate.plan import make_plan, planned_steps
from solo_vlm.train.model import set_trainable
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError

ALONE = ParallelDims(dp=1, tp=1, gradient_accumulation_steps=128)
A100 = find_device("A100-80GB")
TOKENS = 512
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIG = SoloConfig(text_config=LlamaConfig(**SIZES), image_token_id=60, vision_patch_size=4)


def recipe(*overrides: str, **settings) -> Recipe:
    plain = {"model": "m", "out": "o", "steps": 10, "data": {"sources": [{"path": "x"}]}, **settings}
    return Recipe.parse(plain).override([f"data.sequence_length={TOKENS}", *overrides])


def plan_memory(config: SoloConfig, settings: Recipe, dims: ParallelDims = ALONE):
    return memory_per_device(Layout.of(config, settings, dims), settings)


def start(config: SoloConfig):
    """Return a model in FSDP's compute precision and a sequence of supervised patches."""
    model = SoloForConditionalGeneration(config).to(torch.bfloat16).train()
    ids = torch.full((1, TOKENS), config.image_token_id)
    pixels = torch.randint(256, (TOKENS, config.patch_dim), dtype=torch.uint8)
    return model, {"input_ids": ids, "pixel_values": pixels, "labels": ids, "use_cache": False}


def test_weights_gradients_and_moments_are_exact():
    model = SoloForConditionalGeneration(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [
        tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"
    ]
    memory = plan_memory(CONFIG, recipe())
    assert memory.weights == memory.gradients == size(model.parameters())
    assert memory.optimizer == size(moments)
    shared = plan_memory(CONFIG, recipe(), ParallelDims(4, 1, 32))
    assert shared.weights + shared.gradients + shared.optimizer == 16 * count_parameters(CONFIG).total / 4


@pytest.mark.parametrize("name", ["adamw_bf16", "adamw_8bit", "muon"])
@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 64}}, {"trainable": "patch_embedding"}])
def test_optimizer_state_matches_optimizer(name, changes):
    if name == "adamw_8bit":
        pytest.importorskip("torchao")
    model = SoloForConditionalGeneration(CONFIG)
    settings = recipe(f"optimizer.name={name}", **changes)
    set_trainable(model, settings)
    states = make_optimizer(model, settings.optimizer).state.values()
    expected = size(tensor for state in states for key, tensor in state.items() if key != "step")
    assert plan_memory(CONFIG, settings).optimizer == expected


def test_tensor_parallelism_splits_layer_matrices_and_head():
    counts = count_parameters(CONFIG)
    split = plan_memory(CONFIG, recipe("parallel.tensor=2"), ParallelDims(1, 2, 128))
    assert split.weights == 4 * (counts.total - (counts.attention + counts.mlp + counts.head) // 2)


@pytest.mark.parametrize(
    "modes", [LayerModes(none=4), LayerModes(full=4), LayerModes(full=1, none=3), LayerModes(full=3, none=1)]
)
def test_kept_activations_match_autograd_saved_tensors(modes):
    model, batch = start(CONFIG)
    prepare_layers(model, modes)
    expected = saved_bytes(model, batch) + batch["pixel_values"].nbytes
    if not modes.none:  # checkpoints hold cosines and sines of positions without saving them
        expected += 2 * 2 * TOKENS * SIZES["head_dim"]
    kept = kept_activations(replace(Layout.of(CONFIG, recipe(), ALONE), modes=modes), recipe())
    assert kept == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("family", "modes", "vocabulary"),
    [
        ("llama", LayerModes(none=4), 64),
        ("llama", LayerModes(selective=4), 64),
        ("llama", LayerModes(full=4), 64),
        ("llama", LayerModes(full=4), 16384),  # the loss needs more than a layer
        ("llama", LayerModes(full=1, selective=3), 64),
        ("llama", LayerModes(full=3, selective=1), 64),
        ("llama", LayerModes(selective=2, none=2), 64),
        ("llama", LayerModes(full=2, selective=1, none=1), 64),
        ("qwen3", LayerModes(none=4), 64),
        ("gemma3", LayerModes(none=4), 64),
    ],
)
def test_activations_match_measured_peak_of_a_step(family, modes, vocabulary):
    text = LLM_CONFIGS[family](**{**SIZES, "vocab_size": vocabulary, "pad_token_id": 0})
    text.sliding_window = 4096
    config = SoloConfig(text_config=text, image_token_id=60, vision_patch_size=4)
    model, batch = start(config)
    prepare_layers(model, modes)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        model(**batch).loss.backward()
    parts = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    held = {getattr(part, "value", part): size for part, size in parts.items()}
    peak = held["Total"] - held["Parameter"] - held["Gradient"] - held["Buffer"]
    planned = peak_activations(replace(Layout.of(config, recipe(), ALONE), modes=modes), recipe())
    assert planned == pytest.approx(peak + batch["pixel_values"].nbytes, rel=0.2)


def test_auto_recomputes_the_least_that_fits():
    settings = recipe("activation_checkpointing=auto")
    before = None
    seen = set()
    for memory in range(32_000_000, 46_000_000, 1_000_000):
        layout = plan_layout(CONFIG, settings, ALONE, memory)
        modes, total = layout.modes, memory_per_device(layout, settings).total
        assert len(modes.layers) == 4
        assert not (modes.full and modes.none)  # all are selective before any keeps everything
        assert total <= 0.9 * memory or modes == LayerModes(full=4)
        if before is not None:
            assert (modes.full, -modes.none) <= (before.full, -before.none)
        before = modes
        seen.add(modes)
    assert {LayerModes(full=4), LayerModes(full=2, selective=2), LayerModes(none=4)} < seen


def test_auto_recomputes_nothing_in_main_memory():
    assert plan_layout(CONFIG, recipe("activation_checkpointing=auto"), ALONE, None).modes.none == 4


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "what GPT2Attention keeps grows with the square of a document's length"),
        ("mamba2", "what layers of mamba2 keep grows with the square of a document's length"),
        ("longcat_flash", "cannot measure what layers of longcat_flash keep: .*"),
        ("deepseek_v4", "cannot count FLOPs of deepseek_v4: it compresses keys"),
    ],
)
def test_auto_is_rejected_where_activations_are_not_known(family, reason):
    settings = recipe("activation_checkpointing=auto", "data.sequence_length=32768")
    with pytest.raises(SoloError, match=f"auto: {reason}; set it to full, selective or none"):
        plan_layout(tiny_config(family), settings, ALONE, A100.memory)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # with tied and untied head
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": "patch_embedding"},
        {"trainable": "new_tokens"},
        {"lora": {"rank": 3}},
        {"lora": {"rank": 3, "targets": ["q_proj", "v_proj", "down_proj"]}, "trainable": "new_tokens"},
    ],
)
def test_trained_parameters_match_those_with_gradients(family, changes):
    model = make_solo(family).model
    settings = recipe(**changes)
    expected = trained_parameters(ModelShape.of(model.config), settings)
    set_trainable(model, settings)
    assert expected == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with a model, a large and a small text source in small row groups."""
    folder = tmp_path_factory.mktemp("plan")
    make_solo().save(folder / "start")
    for name, count in (("many", 1500), ("few", 300)):
        write_samples(folder / f"{name}.parquet", (text(number) for number in range(count)))
    return folder


def text(number: int) -> dict:
    words = "a red circle left of a blue square. " * (1 + number * 7 % 5)
    turn = {"role": "assistant", "content": [{"type": "text", "text": words}]}
    return {"id": str(number), "messages": [turn], "images": []}


def of_data(folder, *overrides: str) -> Recipe:
    sources = [{"path": "many.parquet", "weight": 3}, {"path": "few.parquet", "weight": 1}]
    data = {"sources": sources, "sequence_length": 256, "streams": 2, "epochs": 2}
    plain = {"root": str(folder), "model": "start", "out": "o", "global_batch": 4, "data": data}
    return Recipe.parse(plain).override(overrides)


@pytest.mark.parametrize("weight_by", ["samples", "sequences"])
def test_planned_steps_match_packing_of_the_data(data, weight_by):
    settings = of_data(data, f"data.weight_by={weight_by}")
    encoder = Encoder(make_solo().processor)
    items = [
        MixtureItem(open_source(path), source.weight)
        for path, source in zip(settings.mixture.source_paths(), settings.data.sources, strict=True)
    ]
    streams = [
        VirtualStream(index, 2, items, encoder.draft, 256, epochs=2, weight_by=weight_by)
        for index in range(2)
    ]
    sequences = sum(1 for stream in streams for _ in stream)
    assert planned_steps(settings, settings.mixture.open_sources()) == pytest.approx(sequences / 4, rel=0.03)


def test_recipe_without_steps_or_epochs_is_rejected(data):
    settings = of_data(data, "data.epochs=null")
    for find in (lambda: planned_steps(settings, []), lambda: make_plan(settings, 1, A100, 0.4)):
        with pytest.raises(SoloError, match="never end: set one of them"):
            find()


def test_data_estimate_follows_source_weights(data):
    encoder = Encoder(make_solo().processor)
    settings = of_data(data, "steps=5")
    lengths = {
        name: len(encoder.tokenizer(text(number)["messages"][0]["content"][0]["text"])["input_ids"]) + 2
        for number, name in enumerate("abcde")
    }
    mean = sum(lengths.values()) / 5
    estimate = estimate_data(settings, encoder, settings.mixture.open_sources())
    assert estimate.document_length == pytest.approx(mean, rel=0.1)
    assert estimate.vision_share == 0


def test_plan_with_available_data(data):
    settings = of_data(data)
    plan = make_plan(settings, 2, A100, 0.5)
    assert plan.steps == planned_steps(settings, settings.mixture.open_sources())
    assert plan.tokens == plan.steps * 4 * 256
    assert plan.documents == pytest.approx(2 * 1800, rel=0.1)
    config = make_solo().model.config
    length = plan.data.document_length
    flops = training_flops(ModelShape.of(config), [round(length)] * round(256 / length), 0, 256)
    assert plan.flops_per_step == pytest.approx(4 * flops, rel=0.1)
    assert plan.seconds_per_step == pytest.approx(plan.flops_per_step / (2 * 312e12 * 0.5))


def test_dry_run_of_paper_recipe_without_weights_or_data(run):
    status, out, _ = run("train", "solo-7b/stage1", "--dry-run", "--processes", "8", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["parameters"]["total"] == count_parameters(SoloConfig()).total
    assert facts["steps"] == 1525
    assert facts["tokens"] == 1525 * 128 * 32768
    dims = ParallelDims(dp=4, tp=2, gradient_accumulation_steps=32)
    assert facts["parallel"] == {"world_size": 8, **asdict(dims)}
    assert facts["fits"]
    assert sum(facts["memory"].values()) == 2 * facts["memory"]["total"]


def test_dry_run_of_auto_shows_what_the_layers_do(run):
    command = ("train", "solo-7b/stage1", "--dry-run", "--processes", "8", "activation_checkpointing=auto")
    facts = json.loads(run(*command, "--json")[1])
    modes = facts["activation_checkpointing"]
    assert modes["full"] and modes["selective"] and sum(modes.values()) == 32
    assert facts["fits"]
    gib = f"{facts['memory']['total'] / 2**30:.1f} of 80 GiB"
    line = f"full in {modes['full']} layers, selective in {modes['selective']}, none in 0; estimated {gib}"
    assert f"activation checkpointing: {line}" in run(*command)[1].splitlines()


def test_dry_run_prints_plan(run):
    status, out, _ = run("train", "solo-7b/sft", "--dry-run", "--processes", "8", "--device", "h100")
    assert status == 0
    assert "H100" in out and "until the data ends" in out


def test_dry_run_shows_or_rejects_an_update_of_biases(run, tmp_path):
    for family in ("deepseek_v3", "qwen3_moe"):
        make_solo(family).save(tmp_path / family)
    command = ("train", "quickstart/stage1", "--dry-run", f"root={tmp_path}", "router_bias_update=0.001")
    code, out, _ = run(*command, "model=deepseek_v3")
    assert code == 0
    assert "routers     biases move by 0.001 per step to balance experts" in out
    code, _, error = run(*command, "model=qwen3_moe")
    assert code == 2
    assert (
        "the routers of this qwen3_moe model have no biases that balance experts as in DeepSeek-V3" in error
    )


def test_dry_run_has_as_many_processes_as_the_layout_needs(run):
    code, out, _ = run("train", "smollm2-135m/stage1", "--dry-run", "parallel={tensor: 3, replicate: 2}")
    assert code == 0
    assert "processes   6: data parallel 2 (parameters on 2 x 1) x tensor parallel 3" in out


def test_plan_that_does_not_fit_suggests_overrides(run):
    command = ("train", "solo-7b/stage1", "--dry-run", "--device", "rtx-4090", "--processes", "8")
    facts = json.loads(run(*command, "--json", "activation_checkpointing=none")[1])
    assert not facts["fits"]
    ways = {"activation_checkpointing=full", "parallel.tensor=4", "parallel.context=2"}
    assert set(facts["ways_to_fit"]) == ways
    better = json.loads(run(*command, "--json", "parallel.tensor=4", "activation_checkpointing=none")[1])
    assert facts["ways_to_fit"]["parallel.tensor=4"] == better["memory"]["total"]
    assert "It does not fit" in run(*command, "activation_checkpointing=none")[1]


def test_indivisible_tensor_parallel_degree_is_rejected_and_not_suggested(run):
    command = (
        "train",
        "smollm2-135m/stage1",
        "--dry-run",
        "--processes",
        "2",
    )  # 9 query heads, 3 KV heads
    status, _, err = run(*command, "parallel.tensor=2")
    assert status == 2
    assert "self_attn.q_proj has 9 heads, not divisible by 2; set parallel.tensor to 1" in err
    facts = json.loads(run(*command, "--json", "data.sequence_length=262144")[1])
    assert set(facts["ways_to_fit"]) == {"activation_checkpointing=full"}


def test_plan_of_unknown_model_is_rejected(run, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: nowhere\nout: o\nsteps: 1\ndata: {sources: [{path: x}]}\n")
    status, _, err = run("train", str(file), "--dry-run")
    assert status == 2
    assert "nowhere" in err and "solo init" in err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_model_of_a_later_stage_is_not_looked_up_on_the_hub(run, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path / "data.parquet", [pretraining_sample("red")])
    Path("next.yaml").write_text(
        "model: stage1/model\nout: o\nsteps: 1\ndata: {streams: 1, sources: [{path: data.parquet}]}\n"
    )
    status, _, err = run("train", "next.yaml", *more)
    assert status == 2
    assert "no model at stage1/model" in err


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_devices_are_recognized_by_torch_names(name, known):
    device = recognize_device(name)
    assert (device.name if device else None) == known


def test_unknown_device_error_lists_known_devices():
    with pytest.raises(SoloError, match=r"unknown device abacus: known are .*H100"):
        find_device("abacus")


def size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
