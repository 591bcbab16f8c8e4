"""Bytes of collectives against a counter, and the time they take."""

from __future__ import annotations

import json
import os
import re
from collections import Counter

import pytest
from tests.factories import TEXTS, make_solo, run_settings
from torch.utils._python_dispatch import TorchDispatchMode

from solo_vlm.check.tiny import tiny_config, tiny_llm
from solo_vlm.models.from_llm import compose
from solo_vlm.models.load import load_config
from solo_vlm.quickstart.llm import train_tokenizer
from solo_vlm.train import Recipe, train, trainer
from solo_vlm.train.estimate.communication import Network, collectives, crossing_groups, exposed_seconds
from solo_vlm.train.estimate.layout import Layout
from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.utils.errors import SoloError

_SIZE = {  # whole tensors of an operation, from its arguments
    "c10d::_allgather_base_": lambda output, *_: [output],
    "c10d::_reduce_scatter_base_": lambda _, tensor, *__: [tensor],
    "c10d::allreduce_": lambda tensors, *_: tensors,
    "_c10d_functional::all_to_all_single": lambda tensor, *_: [tensor],
    "_c10d_functional::all_reduce": lambda tensor, *_: [tensor],
    "_c10d_functional::all_reduce_": lambda tensor, *_: [tensor],
    "_c10d_functional::all_gather_into_tensor": lambda tensor, size, *_: [tensor] * size,
}
_KIND = {
    "all_to_all": "all-to-all",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "scatter": "reduce-scatter",
    "reduce": "all-reduce",
}


class ByteCounter(TorchDispatchMode):
    """Counter of the bytes of whole tensors in collectives, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in _SIZE:
            kind = next(kind for part, kind in _KIND.items() if part in name)
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in _SIZE[name](*args))
        return func(*args, **kwargs or {})


def count(plain, out):
    """Train, and write the bytes of the second step in rank 0."""
    steps, optimizer_step = [], trainer.optimizer_step

    def counted(*arguments):
        with ByteCounter() as counter:
            result = optimizer_step(*arguments)
        steps.append(counter.bytes)
        return result

    trainer.optimizer_step = counted
    train(Recipe.parse(plain))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(steps[1]))


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (2, {"parallel": {"reshard": False}}),
        (2, {"parallel": {"tensor": 2}, "activation_checkpointing": "full"}),
        (4, {"parallel": {"tensor": 2}}),
        (4, {"parallel": {"tensor": 2}, "trainable": "patch_embedding"}),
        (2, {"lora": {"rank": 2}}),
        (4, {"parallel": {"replicate": 2, "defer_reduction": True}}),
        (4, {"parallel": {"context": 2, "replicate": 2}, "activation_checkpointing": "full"}),
    ],
)
def test_bytes_are_those_counted(runs, tmp_path, start, family, size, changes):
    plain = run_settings(runs, tmp_path / "out", model=family, steps=2, **changes)
    check_bytes(start, plain, size, tmp_path / "bytes.json")


# Whole attention; attention and MLP of which only weights are split; experts; latents; a norm behind the MLP.
@pytest.mark.distributed
@pytest.mark.parametrize("family", ["youtu", "granitemoe", "phi3", "qwen3_moe", "deepseek_v2", "gemma3_text"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_bytes_of_split_families_are_those_counted(runs, tmp_path, start, family, mode):
    compose(tiny_llm(family), train_tokenizer(TEXTS, vocab_size=320)).save(tmp_path / family)
    changes = {"parallel": {"tensor": 2}, "activation_checkpointing": mode, "router_aux_loss": 0}
    plain = run_settings(runs, tmp_path / "out", model=str(tmp_path / family), steps=2, **changes)
    check_bytes(start, plain, 2, tmp_path / "bytes.json")


def check_bytes(start, plain, size, path):
    """Compare the planned bytes of a run with those counted in its second step."""
    assert start(size, count, plain, path).wait(200) == [0] * size
    counted = json.loads(path.read_text())
    recipe = Recipe.parse(plain)
    config = load_config(recipe.mixture.model_source())
    layout = Layout.of(config, recipe, ParallelDims.from_recipe(recipe, size))
    planned = Counter()
    for each in collectives(layout, recipe):
        planned[each.kind] += each.payload
    assert planned.keys() == {kind for kind in counted if counted[kind] > 1000}
    for kind, payload in planned.items():
        assert payload == pytest.approx(counted[kind], rel=0.05), kind


def test_network_of_several_machines_is_as_slow_as_its_links():
    network = Network.parse("nvlink+400g", "H100")
    assert network.bandwidth(1, 8, 64) == pytest.approx(0.8 * 450e9)
    assert network.bandwidth(2, 8, 64) == network.bandwidth(1, 16, 64) == pytest.approx(0.8 * 50e9)
    assert Network.parse("NVLink", "A100-80GB").inside == 300e9


# Which groups are on one machine of eight devices, by parallel dimensions and processes.
@pytest.mark.parametrize(
    ("world_size", "parallel", "inside"),
    [
        (8, {"tensor": 8}, {"hidden states"}),  # a single machine
        (16, {"tensor": 8}, {"hidden states"}),
        (16, {"tensor": 16}, set()),
        (6, {"tensor": 3}, {"hidden states", "weights", "gradients"}),
        (24, {"tensor": 3}, set()),  # the third group is on two machines
        (32, {"tensor": 4, "context": 2}, {"hidden states", "slices for heads"}),
        (32, {"tensor": 4, "context": 4}, {"hidden states"}),
        (16, {"replicate": 2}, {"weights", "gradients"}),
        (16, {"replicate": 4}, {"weights", "gradients"}),
        (32, {"replicate": 2}, set()),
        (16, {"replicate": 16}, set()),
    ],
)
def test_groups_that_cross_machines_are_as_slow_as_the_link_between(world_size, parallel, inside):
    settings = {"parallel": parallel, "global_batch": 96, "precision": "bf16"}
    data = {"sources": [{"path": "x"}], "streams": 96, "workers": 0}
    recipe = Recipe.parse({"model": "m", "out": "o", "steps": 1, "data": data, **settings})
    text = tiny_config("llama", hidden_size=192, num_attention_heads=48, num_key_value_heads=48)
    dims = ParallelDims.from_recipe(recipe, world_size)
    network, speeds = Network.parse("nvlink+400g", "H100"), {}
    for each in collectives(Layout.of(text, recipe, dims), recipe):
        speeds[each.purpose] = each.sent / each.seconds(network)
    big = {purpose for purpose in speeds if purpose not in ("loss", "replicated gradients")}
    assert {purpose for purpose in big if speeds[purpose] == pytest.approx(0.8 * 450e9)} == inside
    assert all(speeds[purpose] == pytest.approx(0.8 * 50e9) for purpose in big - inside)
    crossing = {"hidden states", "slices for heads"} & (big - inside)
    assert bool(crossing_groups(dims, network)) == bool(crossing)


def test_dry_run_warns_of_hidden_states_between_machines(run):
    options = ("--dry-run", "--device", "H100", "--network", "nvlink+400g", "parallel.context=4")
    code, out, error = run("train", "solo-7b/stage1", *options, "--processes", "64", "parallel.tensor=4")
    assert code == 0, error
    groups = "groups of parallel.context x parallel.tensor = 16 cross machines of 8 devices"
    speeds = "hidden states travel at 50 GB/s, not 450; choose a divisor of 8"
    assert f"warning     {groups}: {speeds}" in out.splitlines()


@pytest.mark.parametrize("name", ["infiniband", "nvlink+fast", "nvlink+0g", "400g"])
def test_unknown_network_is_refused_with_examples(name):
    with pytest.raises(SoloError, match=rf"unknown network {re.escape(name)}.* such as nvlink\+400g"):
        Network.parse(name, "H100")


@pytest.mark.parametrize("device", ["RTX-4090", "H100-PCIe"])
def test_nvlink_is_refused_for_devices_without_it(device):
    with pytest.raises(SoloError, match=rf"nvlink\+100g: NVLink does not connect eight {device}; give pcie4"):
        Network.parse("nvlink+100g", device)


def test_network_within_a_machine_is_refused_for_several(run):
    with pytest.raises(SoloError, match="16 devices need several machines of 8; add"):
        Network.parse("nvlink", "H100").bandwidth(1, 16, 16)
    options = ("--dry-run", "--processes", "16", "--device", "H100", "--network", "nvlink")
    code, out, error = run("train", "smollm2-135m/stage1", *options)
    assert (code, out) == (2, "")
    assert "need several machines of 8" in error


def test_communication_is_hidden_by_long_computation_but_for_its_ends():
    plain = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}}
    recipe = Recipe.parse(plain)
    layout = Layout.of(make_solo().model.config, recipe, ParallelDims(8, 1, 16))
    found, network = collectives(layout, recipe), Network.parse("nvlink", "H100")
    alone = sum(each.seconds(network) for each in found)
    exposed = exposed_seconds(found, layout, 1000.0, network)
    assert 0 < exposed < alone
    assert exposed_seconds(found, layout, 0.0, network) == pytest.approx(alone)


def test_reductions_once_per_step_only_hide_behind_the_last_backward_pass():
    parallel = {"replicate": 2, "defer_reduction": True}
    plain = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}, "parallel": parallel}
    recipe, dims = Recipe.parse(plain), ParallelDims(8, 1, 16, replicate=2)
    layout = Layout.of(make_solo().model.config, recipe, dims)
    found, network = collectives(layout, recipe), Network.parse("nvlink", "H100")
    weights, *reductions = (each.seconds(network) for each in found)
    compute = (
        weights + 16 * 3 / 2 * sum(reductions) / 2
    )  # the last backward pass takes half of the reductions
    exposed = exposed_seconds(found, layout, compute, network)
    assert exposed == pytest.approx(
        sum(reductions) / 2 + exposed_seconds(found[:1], layout, compute, network)
    )
