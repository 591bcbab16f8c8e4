"""Optimizers: which parameters each treats, agreement with torch, sharding, and exact resumption."""

from __future__ import annotations

import signal
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from tests.factories import make_solo, read_steps, run_recipe, run_settings, without_layers
from torch.distributed.tensor import DTensor, distribute_tensor

from solo_vlm.check.tiny import tiny_llm
from solo_vlm.train.checkpoint import Checkpointer, TrainState, load_checkpoint
from solo_vlm.train.model import load_base_model, make_model, set_trainable
from solo_vlm.train.optimizer import make_optimizer, named_trainable, orthogonalize
from solo_vlm.train.parallel.context import init_distributed
from solo_vlm.train.recipe import OptimizerSettings, Recipe
from solo_vlm.train.storage import CheckpointStore, Folder
from solo_vlm.utils.errors import SoloError

WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # whole blocks of 8-bit moments
RATES = {"learning_rate": 3e-3, "warmup_steps": 2, "min_learning_rate": 1e-4}


def needs_torchao(name):
    if name == "adamw_8bit":
        pytest.importorskip("torchao")


def train_briefly(settings, steps=3, **changes):
    """Return a model trained on noise, and its optimizer."""
    model = make_solo(**WIDE).model
    if changes:
        plain = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}, **changes}
        set_trainable(model, Recipe.parse(plain))
    optimizer = make_optimizer(model, settings)
    torch.manual_seed(0)
    for _ in range(steps):
        for _, parameter in named_trainable(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def muon_names(model, optimizer):
    found = {parameter for group in optimizer.param_groups if group["muon"] for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if parameter in found}


def test_muon_equals_torch_optim_muon_and_adamw():
    settings = OptimizerSettings(name="muon", **RATES)
    model, optimizer = train_briefly(settings)
    names = muon_names(model, optimizer)
    expected = make_solo(**WIDE).model
    split = {True: [], False: []}
    for name, parameter in expected.named_parameters():
        split[name in names].append(parameter)
    norms = [parameter for parameter in split[False] if parameter.ndim == 1]
    others = [parameter for parameter in split[False] if parameter.ndim > 1]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    rate = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizers = [
        torch.optim.Muon(split[True], adjust_lr_fn="match_rms_adamw", **rate),
        torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True, **rate),
    ]
    torch.manual_seed(0)
    for _ in range(3):
        for parameter in expected.parameters():
            parameter.grad = torch.randn_like(parameter)
        for each in optimizers:
            each.step()
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(parameter, other) for parameter, other in pairs)


def test_muon_leaves_embeddings_head_patches_norms_and_routers_to_adamw():
    model = make_solo("mixtral").model
    names = muon_names(model, make_optimizer(model, OptimizerSettings(name="muon")))
    layers = {name for name in names if ".layers." in name}
    assert names == layers
    assert {name.split(".")[-2] for name in names} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not [name for name in names if "norm" in name or "router" in name or name.endswith("gate.weight")]


@pytest.mark.parametrize("family", ["dbrx", "jetmoe"])  # their routers have a linear layer inside
def test_muon_leaves_layers_in_routers_to_adamw(family):
    model = tiny_llm(family)
    names = muon_names(model, make_optimizer(model, OptimizerSettings(name="muon")))
    assert names and not [name for name in names if "router" in name]


def test_muon_orthogonalizes_transposed_layers_of_gpt2():
    model = tiny_llm("gpt2")
    names = muon_names(model, make_optimizer(model, OptimizerSettings(name="muon")))
    assert {name.rsplit(".", 2)[1] for name in names} == {"c_attn", "c_proj", "c_fc"}


def test_muon_without_matrices_is_refused():
    with pytest.raises(SoloError, match="muon: found no linear layers in decoder layers; use adamw"):
        make_optimizer(without_layers(), OptimizerSettings(name="muon"))


@pytest.mark.parametrize("name", ["muon", "adamw_bf16", "adamw_8bit"])
def test_patch_embedding_keeps_its_own_rate(name):
    needs_torchao(name)
    settings = OptimizerSettings(name=name, learning_rate=1e-3, patch_learning_rate=2e-4)
    model, optimizer = train_briefly(settings, steps=0)
    (patch,) = [group for group in optimizer.param_groups if group["scale"] != 1.0]
    assert patch["params"][0] is model.model.embed_vision_patch.weight
    assert patch["scale"] == pytest.approx(0.2)


@pytest.mark.parametrize(("name", "bytes_per_value"), [("adamw_bf16", 4), ("adamw_8bit", 2 + 2 * 4 / 64)])
def test_compact_moments_follow_adamw(name, bytes_per_value):
    needs_torchao(name)
    model, optimizer = train_briefly(OptimizerSettings(name=name, **RATES), steps=20)
    expected, _ = train_briefly(OptimizerSettings(**RATES), steps=20)
    start = dict(make_solo(**WIDE).model.named_parameters())
    for (key, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        moved = (other - start[key]).norm()
        assert (parameter - other).norm() < 0.05 * moved, key
    weight = next(parameter for key, parameter in model.named_parameters() if "up_proj" in key)
    state = {key: value for key, value in optimizer.state[weight].items() if key != "step"}
    assert sum(value.numel() * value.element_size() for value in state.values()) == (
        bytes_per_value * weight.numel()
    )


@pytest.mark.parametrize("name", ["muon", "adamw_bf16", "adamw_8bit"])
def test_adapters_train(name):
    needs_torchao(name)
    settings = OptimizerSettings(name=name, **RATES)
    before, _ = train_briefly(settings, steps=0, lora={"rank": 4})
    after, _ = train_briefly(settings, lora={"rank": 4})
    pairs = zip(named_trainable(before), named_trainable(after), strict=True)
    assert all(not torch.equal(first, second) for (_, first), (_, second) in pairs)


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    matrices = [torch.randn(24, 40), torch.randn(24, 40)]
    for matrix in orthogonalize([matrix.bfloat16() for matrix in matrices]):
        values = torch.linalg.svdvals(matrix.float())
        assert 0.3 < values.min() < values.max() < 1.5


def test_second_beta_above_bfloat16_rounding_is_refused():
    with pytest.raises(SoloError, match=r"betas = \[0.9, 0.999\]: bfloat16 moments would round off"):
        Recipe.parse(
            {
                "model": "m",
                "out": "o",
                "data": {"sources": [{"path": "x"}]},
                "optimizer": {"name": "adamw_bf16", "betas": [0.9, 0.999]},
            }
        )


def test_8bit_moments_without_torchao_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    with pytest.raises(SoloError, match="requires torchao; pip install"):
        make_optimizer(make_solo(**WIDE).model, OptimizerSettings(name="adamw_8bit"))


# ------------------------------------------------------------------------------------ several processes

NAMES = ["muon", "adamw_bf16", *(["adamw_8bit"] if find_spec("torchao") else [])]


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """Return a folder with checkpoints of each optimizer after two and three steps in one process."""
    make_solo("qwen3", **WIDE).save(runs / "wide")
    folder = tmp_path_factory.mktemp("whole")
    step_and_save(runs, folder, 1, None)
    return folder


def settings_of(runs, out, name, tensor=1):
    optimizer = {"name": name, "learning_rate": 3e-3, "warmup_steps": 2, "min_learning_rate": 1e-4}
    return run_settings(runs, out, model="wide", optimizer=optimizer, parallel={"tensor": tensor})


def step_and_save(runs, out, tensor, start):
    """Save the second step from the initial model, and the third one from the second of `start`."""
    recipe = Recipe.parse(settings_of(runs, out, "adamw", tensor))
    with init_distributed(recipe) as context:
        for name in NAMES:
            model, _ = make_model(recipe, context)
            optimizer = make_optimizer(model, OptimizerSettings(name=name))
            checkpointer = Checkpointer(CheckpointStore(out / name), 2, False, context)
            for step in range(3):
                if step == 2 and start:
                    load_checkpoint(Folder(start / name / "step-00000002"), model, optimizer)
                torch.manual_seed(step)
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape)
                    if isinstance(parameter, DTensor):
                        layout = parameter.device_mesh, parameter.placements
                        parameter.grad = distribute_tensor(parameter.grad, *layout, src_data_rank=None)
                optimizer.step()
                if step:
                    checkpointer.save(model, optimizer, TrainState(step=step + 1))


def read(runs, path, name):
    """Return parameters and optimizer state of a checkpoint, by name."""
    model, _ = load_base_model(runs / "wide")
    optimizer = make_optimizer(model, OptimizerSettings(name=name))
    load_checkpoint(Folder(path), model, optimizer)
    state = {
        f"{key}/{part}": tensor
        for key, parameter in model.named_parameters()
        for part, tensor in optimizer.state[parameter].items()
    }
    return dict(model.named_parameters()) | state


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "tensor"), [(2, 1), (2, 2), (4, 2)])
def test_sharded_steps_and_loaded_checkpoints_equal_one_process(runs, tmp_path, start, whole, size, tensor):
    assert start(size, step_and_save, runs, tmp_path, tensor, whole).wait() == [0] * size
    for name in NAMES:
        for step in (2, 3):
            found, expected = (
                read(runs, folder / name / f"step-{step:08d}", name) for folder in (tmp_path, whole)
            )
            assert found.keys() == expected.keys()
            for key in expected:
                assert torch.equal(found[key], expected[key]), (name, step, key)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_resume_after_sigkill_matches_whole_run(runs, tmp_path, start, whole, name):
    plain, again = (settings_of(runs, tmp_path / out, name) for out in ("whole", "killed"))
    assert start(1, run_recipe, plain).wait() == [0]
    group = start(1, run_recipe, again)
    while not list((tmp_path / "killed" / "checkpoints").glob("step-*")):
        assert group.processes[0].is_alive()
        time.sleep(0.02)
    group.kill()
    assert group.wait() == [-signal.SIGKILL]
    assert start(1, run_recipe, again).wait() == [0]
    curves = ([line["loss"] for line in read_steps(tmp_path / out)] for out in ("whole", "killed"))
    assert next(curves) == next(curves)
