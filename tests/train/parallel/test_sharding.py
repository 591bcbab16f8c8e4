"""Sharded training: losses equal those of one process."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch
from tests.factories import (
    image_rows,
    make_solo,
    read_modes,
    read_steps,
    run_mixed_checkpointing,
    run_recipe,
    run_settings,
    text_rows,
    write_training_data,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from solo_vlm.data.collate import collate
from solo_vlm.models.load import load_model
from solo_vlm.models.packed import attention
from solo_vlm.models.packed.groups import document_groups
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train import Recipe, trainer
from solo_vlm.train import model as model_module
from solo_vlm.train.failures import Stopped
from solo_vlm.train.model import load_base_model, make_model
from solo_vlm.train.parallel.context import init_distributed
from solo_vlm.train.parallel.sharding import layers_per_fsdp_unit, shard_model
from solo_vlm.train.trainer import forward_backward


def run_layer_by_layer(plain):
    """Train with one FSDP unit per layer."""
    model_module.shard_model = partial(shard_model, unit_size=1)
    run_recipe(plain)


def stop_in_fourth_step(plain):
    """Train with mixed activation checkpointing, and save after a signal."""
    calls, optimizer_step = [], trainer.optimizer_step

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimizer_step(*arguments)

    trainer.optimizer_step = counted
    with suppress(Stopped):
        run_mixed_checkpointing(plain)


def describe_shards(plain, path):
    """Write this process's part of each parameter: whether it is a DTensor, elements, mesh dimensions."""
    recipe = Recipe.parse(plain)
    with init_distributed(recipe) as context:
        model, _ = make_model(recipe, context)
        held = {
            name: [isinstance(p, DTensor), p.to_local().numel(), list(p.device_mesh.mesh_dim_names)]
            for name, p in model.named_parameters()
        }
        whole = {name: p.full_tensor() for name, p in model.named_parameters()}
        source, _ = load_base_model(recipe.mixture.model_source())
        same = all(torch.equal(whole[name], p) for name, p in source.named_parameters())
        path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps([held, same]))


def train_with_a_leak(plain):
    """Train with an attention that takes all documents of a row for one."""
    attention.document_groups = lambda bounds, *options: document_groups(bounds[[0, -1]], *options)
    run_recipe(plain)


@pytest.mark.distributed
def test_leak_between_documents_stops_all_processes(runs, tmp_path, start):
    """Rank 0, which alone reads the model, finds it before the model is sharded."""
    group = start(2, train_with_a_leak, run_settings(runs, tmp_path / "out", model="mistral"))
    assert 0 not in group.wait()
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("family", "size", "parallel"),
    [
        ("llama", 2, {}),
        ("llama", 4, {}),
        ("llama", 2, {"tensor": 2}),
        ("llama", 4, {"tensor": 2}),
        ("mistral", 4, {"tensor": 2}),  # sliding window
        ("qwen3", 2, {"tensor": 2}),  # head norms
        ("qwen3", 4, {"tensor": 2}),
        ("llama", 2, {"defer_reduction": True}),
        ("llama", 2, {"replicate": 2}),
        ("llama", 4, {"replicate": 2}),
        ("qwen3", 4, {"replicate": 2, "defer_reduction": True}),
        ("qwen3", 4, {"replicate": 2, "tensor": 2}),
        ("llama", 2, {"context": 2}),
        ("mistral", 4, {"context": 2}),
        ("qwen3", 4, {"context": 4}),  # fewer key heads than processes
        ("llama", 4, {"context": 2, "replicate": 2}),
        ("mistral", 4, {"context": 2, "tensor": 2}),
    ],
    ids=str,
)
@pytest.mark.distributed
def test_losses_match_single_process(runs, tmp_path, start, family, size, parallel):
    alone = run_settings(runs, tmp_path / "alone", model=family)
    shared = run_settings(runs, tmp_path / "shared", model=family, parallel=parallel)
    group = start(size, run_recipe, shared)
    assert start(1, run_recipe, alone).wait() == [0]
    assert group.wait() == [0] * size
    curves = [read_steps(tmp_path / name) for name in ("alone", "shared")]
    for key in ("loss", "gradient_norm"):
        ours, theirs = ([line[key] for line in curve] for curve in curves)
        assert len(ours) == len(theirs) == 20
        assert ours == pytest.approx(theirs, rel=1e-4)
    weights = [load_model(tmp_path / name / "model").state_dict() for name in ("alone", "shared")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"trainable": "patch_embedding", "parallel": {"tensor": 2}}),  # head norms stay frozen
        ("llama", {"trainable": "new_tokens", "lora": {"rank": 2}}),  # in a tied head
    ],
    ids=str,
)
@pytest.mark.distributed
def test_partly_frozen_models_match_single_process(runs, tmp_path, start, family, changes):
    changes = {"model": family, "steps": 6, **changes}
    group = start(2, run_recipe, run_settings(runs, tmp_path / "shared", **changes))
    assert start(
        1, run_recipe, run_settings(runs, tmp_path / "alone", **changes | {"parallel": {}})
    ).wait() == [0]
    assert group.wait() == [0, 0]
    ours, theirs = (read_steps(tmp_path / name) for name in ("shared", "alone"))
    for key in ("loss", "gradient_norm"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-4), key
    weights = [load_model(tmp_path / name / "model").state_dict() for name in ("alone", "shared")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"activation_checkpointing": "full"}),
        ("mixtral", {"activation_checkpointing": "selective", "parallel": {"reshard": False}}),
        ("granitemoe", {"lora": {"rank": 2}}),
        ("qwen3_moe", {"parallel": {"tensor": 2}}),
        ("jetmoe", {}),
        ("qwen3_next", {"activation_checkpointing": "full"}),
        ("deepseek_v3", {"router_aux_loss": "auto"}),
    ],
    ids=str,
)
@pytest.mark.distributed
def test_sharded_experts_match_single_process(tmp_path, start, family, changes):
    """Experts are one tensor, split between processes; the routers of DeepSeek-V3 have buffers."""
    write_training_data(tmp_path, image_rows(24), text_rows(64))
    make_solo(family).save(tmp_path / family)
    changes = {"model": family, "steps": 6, "router_aux_loss": 1.0, **changes}
    group = start(2, run_recipe, run_settings(tmp_path, tmp_path / "shared", **changes))
    alone = run_settings(tmp_path, tmp_path / "alone", **{**changes, "parallel": {}})
    assert start(1, run_recipe, alone).wait() == [0]
    assert group.wait() == [0, 0]
    ours, theirs = (read_steps(tmp_path / name) for name in ("shared", "alone"))
    for key in ("loss", "gradient_norm", *(name for name in theirs[0] if name.startswith("moe/"))):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-4), key
    assert ("moe/aux_loss" in ours[0]) == (family != "deepseek_v3")
    weights = [load_model(tmp_path / name / "model").state_dict() for name in ("alone", "shared")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
def test_layers_that_transformers_does_not_mark_are_sharded(runs, tmp_path, start):
    make_solo("gpt_neox_japanese", attention_dropout=0.0).save(tmp_path / "model")
    for name, size in (("alone", 1), ("shared", 2)):
        plain = run_settings(runs, tmp_path / name, model=str(tmp_path / "model"), steps=3)
        assert start(size, run_recipe, plain).wait() == [0] * size
    ours, theirs = ([line["loss"] for line in read_steps(tmp_path / name)] for name in ("shared", "alone"))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("size", "tensor"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.distributed
def test_every_process_holds_its_shards_only(runs, tmp_path, start, size, tensor):
    plain = run_settings(runs, tmp_path / "out", parallel={"tensor": tensor})
    assert start(size, describe_shards, plain, tmp_path / "held").wait() == [0] * size
    source, _ = load_base_model(runs / "llama")
    held = [json.loads((tmp_path / f"held-{rank}").read_text()) for rank in range(size)]
    assert all(same for _, same in held)
    for name, parameter in source.named_parameters():
        shares = [parameters[name] for parameters, _ in held]
        assert all(is_sharded for is_sharded, _, _ in shares)
        split = "tp" in shares[0][2]
        assert split == (tensor > 1 and name.endswith("proj.weight"))
        copies = 1 if split else tensor
        assert sum(elements for _, elements, _ in shares) == copies * parameter.numel()
        if parameter.ndim > 1:
            assert max(elements for _, elements, _ in shares) <= 1.1 * copies * parameter.numel() / size


class Collectives(TorchDispatchMode):
    """Count of operations; torch's CommDebugMode loses track of modules that the loss computes again."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation._schema.name] += 1
        return operation(*args, **(kwargs or {}))


def count_reductions(plain, path):
    """Write the all-reduces and reduce-scatters of the gradients of a step of four sequences."""
    recipe = Recipe.parse(plain)
    with init_distributed(recipe) as context:
        model, _ = make_model(recipe, context)
        isolate_documents(model)
        rows = [collate([], 32, 0)] * 4
        with Collectives() as collectives:
            forward_backward(model, rows, 1, nullcontext(), None, (0, 1), recipe.parallel.defer_reduction)
        counted = [collectives.counts[f"c10d::{kind}"] for kind in ("allreduce_", "_reduce_scatter_base_")]
    path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps(counted))


@pytest.mark.parametrize(
    ("parallel", "reductions"),
    [
        ({}, (0, 4)),
        ({"defer_reduction": True}, (0, 1)),
        ({"replicate": 2}, (1, 4)),
        ({"replicate": 2, "defer_reduction": True}, (1, 1)),
    ],
    ids=str,
)
@pytest.mark.distributed
def test_gradients_are_reduced_over_copies_once_per_step(runs, tmp_path, start, parallel, reductions):
    plain = run_settings(runs, tmp_path / "out", parallel=parallel)
    assert start(4, count_reductions, plain, tmp_path / "counted").wait() == [0] * 4
    for rank in range(4):
        counted = json.loads((tmp_path / f"counted-{rank}").read_text())
        assert counted == [2 * count for count in reductions]  # units: both layers, and what is outside


@pytest.mark.distributed
def test_ranks_without_images_do_not_hang_others(runs, tmp_path, start):
    """In some steps no sequence has an image, in others only one of four."""
    data = run_settings(runs, tmp_path)["data"]
    data["sources"] = [{"path": "images.parquet", "weight": 1}, {"path": "text.parquet", "weight": 8}]
    shared = run_settings(runs, tmp_path / "shared", data=data)
    assert start(4, run_recipe, shared).wait() == [0] * 4
    assert start(1, run_recipe, run_settings(runs, tmp_path / "alone", data=data)).wait() == [0]
    ours, theirs = (read_steps(tmp_path / name) for name in ("alone", "shared"))
    image_tokens = 4  # two patches, start and end
    assert {0, image_tokens} <= {line["vision_tokens"] for line in ours}
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-4)


@pytest.mark.distributed
def test_epoch_ends_on_all_ranks_together(runs, tmp_path, start):
    """The last steps have empty slots; every sample is read, and losses match those of one process."""
    data = {**run_settings(runs, tmp_path)["data"], "epochs": 1}
    for name, size in (("alone", 1), ("shared", 4)):
        plain = run_settings(runs, tmp_path / name, steps=None, data=data)
        assert start(size, run_recipe, plain).wait() == [0] * size
    ours, theirs = (read_steps(tmp_path / name) for name in ("alone", "shared"))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-4)
    manifest = json.loads((tmp_path / "shared" / "manifest.json").read_text())
    assert manifest["outcome"]["data"]["samples"] == 24 * 3 + 64


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (run_recipe, {"activation_checkpointing": "full"}),
        (run_recipe, {"activation_checkpointing": "selective"}),
        (run_recipe, {"compile": True}),
        (run_recipe, {"compile": True, "activation_checkpointing": "full", "parallel": {"tensor": 2}}),
        (run_recipe, {"compile": True, "activation_checkpointing": "selective", "parallel": {"tensor": 2}}),
        (run_mixed_checkpointing, {}),
        (run_mixed_checkpointing, {"compile": True}),
        (run_mixed_checkpointing, {"compile": True, "parallel": {"tensor": 2}}),
        (run_mixed_checkpointing, {"compile": True, "parallel": {"context": 2}}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.distributed
def test_memory_and_speed_settings_keep_losses(runs, tmp_path, start, task, changes):
    for name, run, more in (("plain", run_recipe, {}), ("changed", task, changes)):
        group = start(2, run, run_settings(runs, tmp_path / name, steps=6, **more))
        assert group.wait() == [0, 0]
    ours, theirs = ([line["loss"] for line in read_steps(tmp_path / name)] for name in ("plain", "changed"))
    assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.distributed
def test_auto_checkpointing_changes_with_the_layout_on_resume(runs, tmp_path, start):
    """A run on two processes goes on alone, in main memory, where nothing is recomputed."""
    plain = run_settings(runs, tmp_path / "out", activation_checkpointing="auto", steps=8)
    assert start(2, stop_in_fourth_step, plain).wait() == [0, 0]
    assert start(1, run_recipe, plain).wait() == [0]
    assert read_modes(tmp_path / "out") == {"full": 0, "selective": 0, "none": 2}
    whole = run_settings(runs, tmp_path / "whole", steps=8)
    assert start(1, run_recipe, whole).wait() == [0]
    ours, theirs = ([line["loss"] for line in read_steps(tmp_path / name)] for name in ("out", "whole"))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16"}, {"activation_checkpointing": "full"}], ids=str
)
@pytest.mark.distributed
def test_fsdp_units_of_several_layers_keep_losses(runs, tmp_path, start, changes):
    for name, task in (("together", run_recipe), ("alone", run_layer_by_layer)):
        assert start(2, task, run_settings(runs, tmp_path / name, steps=6, **changes)).wait() == [0, 0]
    together, alone = (
        [line["loss"] for line in read_steps(tmp_path / name)] for name in ("together", "alone")
    )
    assert together == alone


@pytest.mark.distributed
def test_two_processes_learn_in_bf16(runs, tmp_path, start):
    assert start(2, run_recipe, run_settings(runs, tmp_path / "out", precision="bf16", steps=40)).wait() == [
        0,
        0,
    ]
    curve = [line["loss"] for line in read_steps(tmp_path / "out")]
    assert curve[-1] < 0.5 * curve[0]


@pytest.mark.parametrize(
    ("layers", "parameters", "together"),
    [
        (32, 218_112_000, 1),  # Mistral-7B
        (24, 67_000_000, 2),  # SmolLM2-1.7B
        (32, 9_840_000, 8),  # SmolLM2-360M
        (30, 3_541_000, 15),  # SmolLM2-135M: two units
        (2, 1_000, 2),
    ],
)
def test_small_layers_share_an_fsdp_unit(layers, parameters, together):
    assert layers_per_fsdp_unit(layers, parameters) == together
