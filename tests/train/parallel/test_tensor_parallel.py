"""Tensor parallelism: every family matches one process, or is rejected by its configuration."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tests.factories import run_settings
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM, MistralConfig

from solo_vlm.check.tiny import text_families, tiny_config, tiny_llm
from solo_vlm.train import Recipe
from solo_vlm.train.activation_checkpointing import prepare_layers
from solo_vlm.train.parallel.context import init_distributed
from solo_vlm.train.parallel.sharding import (
    average_replicated_gradients,
    load_full_state_dict,
    shard_model,
)
from solo_vlm.train.parallel.tensor_parallel import check_tensor_parallel, tensor_parallel_obstacle
from solo_vlm.utils.errors import SoloError

STEPS = 3
NO_PLAN = "transformers has no plan for its layers"
REJECTED = {
    "doge": "self_attn.A is beside split layers, but not in the plan",
    "longcat_flash": "mlp.experts are not the experts of which processes can take a share each",
}


def run_steps(model, context=None):
    """Return the losses, the first gradients and the final weights of a few optimizer steps."""
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, eps=0.1)  # no chaos from tiny gradients
    losses, gradients = [], {}
    for step in range(STEPS):
        ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(step))
        loss = 0.0
        for row in ids.chunk(2) if context is None else ids.chunk(2)[context.dp_rank :: context.dims.dp]:
            logits = model(input_ids=row, use_cache=False).logits
            part = F.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum") / (2 * 23)
            part.backward()
            loss += part.item()
        if context:
            (loss,) = context.sum(loss)
            average_replicated_gradients(list(named.values()), context.mesh)
        losses.append(loss)
        if not step:
            gradients = {name: whole(p.grad).clone() for name, p in named.items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=options) if context else model.state_dict()
    return losses, gradients, weights


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def differences(ours, theirs):
    """Return what differs by more than 1e-4."""
    found = []
    for step, (our, their) in enumerate(zip(ours[0], theirs[0], strict=True)):
        if our != pytest.approx(their, rel=1e-4):
            found.append(f"loss {our} in step {step}, not {their}")
    least = 1e-3 * sum(gradient.norm() ** 2 for gradient in theirs[1].values()) ** 0.5
    for name, gradient in theirs[1].items():
        error = (ours[1][name] - gradient).norm() / max(gradient.norm(), least)
        if error > 1e-4:
            found.append(f"gradient of {name}: relative error {error:.1e}")
    for name, weight in theirs[2].items():
        if weight.is_floating_point() and (error := (ours[2][name] - weight).abs().max()) > 1e-4:
            found.append(f"weight {name}: error {error:.1e}")
    return found[:3]


def compare_families(plain, families, path):
    """Write what differs between split and whole models by family."""
    recipe = Recipe.parse(plain)
    result = {}
    with init_distributed(recipe) as context:
        for number, family in enumerate(families):
            source = tiny_llm(family)
            state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
            shard_model(model, recipe, context)
            buffers = dict(source.named_buffers())
            load_full_state_dict(model, state if context.is_main_process else {}, buffers, context.device)
            split = any("tp" in p.device_mesh.mesh_dim_names for p in model.parameters())
            ours = run_steps(model, context)
            if context.rank == number % context.dims.world_size:  # one process compares
                result[family] = differences(ours, run_steps(source)) if split else ["is not split"]
    path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps(result))


def count_all_reduces(plain, path):
    """Write the all-reduces per layer of a forward and backward pass, without and with recomputation."""
    recipe = Recipe.parse(plain)
    counted = []
    with init_distributed(recipe) as context:
        for mode in ("none", "full"):
            model = tiny_llm("llama")
            shard_model(model, recipe, context)
            prepare_layers(model, mode)
            with CommDebugMode() as communication:
                model(input_ids=torch.arange(24)[None], use_cache=False).logits.sum().backward()
            all_reduces = communication.get_comm_counts()[torch.ops.c10d_functional.all_reduce]
            counted.append(all_reduces / model.config.num_hidden_layers)
    path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps(counted))


def compare(start, tmp_path, size, families):
    plain = run_settings(tmp_path, tmp_path / "out", parallel={"tensor": 2})
    assert start(size, compare_families, plain, families, tmp_path / "found").wait(600) == [0] * size
    results = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(size)]
    return {family: found for result in results for family, found in result.items()}


@pytest.fixture(scope="module")
def obstacles():
    return {family: tensor_parallel_obstacle(tiny_config(family)) for family in text_families()}


def test_families_with_a_plan_are_supported_or_rejected_with_a_reason(obstacles):
    rejected = {family: reason for family, reason in obstacles.items() if reason and reason != NO_PLAN}
    assert rejected == REJECTED
    assert sum(reason is None for reason in obstacles.values()) >= 90


@pytest.mark.distributed
def test_split_families_match_a_single_process(obstacles, start, tmp_path):
    families = [family for family, reason in obstacles.items() if reason is None]
    found = compare(start, tmp_path, 2, families)
    assert {family: found[family] for family in families if found[family]} == {}


@pytest.mark.distributed
def test_split_and_sharded_families_match_a_single_process(start, tmp_path):
    kinds = ["phi3", "mixtral", "deepseek_v2", "gpt_oss", "llama4_text"]
    assert compare(start, tmp_path, 4, kinds) == {family: [] for family in kinds}


@pytest.mark.distributed
def test_a_layer_needs_four_all_reduces_or_five_with_recomputation(start, tmp_path):
    """Outputs of attention and MLP, gradients of their inputs, and the output of attention once more."""
    plain = run_settings(tmp_path, tmp_path / "out", parallel={"tensor": 2})
    assert start(2, count_all_reduces, plain, tmp_path / "counted").wait() == [0, 0]
    assert [json.loads((tmp_path / f"counted-{rank}").read_text()) for rank in range(2)] == [[4, 5]] * 2


def test_indivisible_heads_are_rejected_with_supported_sizes():
    config = MistralConfig(num_hidden_layers=1)
    with pytest.raises(SoloError, match=r"k_proj has 8 heads, not divisible by 16; .* to 1 or 2 or 4 or 8"):
        check_tensor_parallel(config, 16)
    check_tensor_parallel(config, 8)


def test_indivisible_experts_are_rejected():
    assert tensor_parallel_obstacle(tiny_config("mixtral"), 3)
    config = tiny_config("mixtral", num_local_experts=3)
    assert tensor_parallel_obstacle(config) == "mlp.experts are 3, not divisible by 2"


def test_parameters_beside_split_layers_need_a_plan():
    """The plan of Qwen3 without its norms of heads would leave their gradients partial."""
    config = tiny_config("qwen3")
    config.base_model_tp_plan = {k: v for k, v in config.base_model_tp_plan.items() if "norm" not in k}
    assert (
        tensor_parallel_obstacle(config)
        == "self_attn.q_norm.weight is beside split layers, but not in the plan"
    )
