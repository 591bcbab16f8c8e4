"""Shares of processes in a split model, against the models that tensor parallelism makes."""

from __future__ import annotations

import json

import pytest
import torch
from tests.factories import run_settings
from torch.distributed.tensor import DTensor

from solo_vlm.check.tiny import text_families, tiny_config
from solo_vlm.models.flops import ModelShape
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.train import Recipe
from solo_vlm.train.estimate.layout import Layout
from solo_vlm.train.estimate.memory import kept_activations, memory_per_device
from solo_vlm.train.parallel.context import TP, ParallelDims, init_distributed
from solo_vlm.train.parallel.sharding import shard_model
from solo_vlm.train.parallel.tensor_parallel import split_layers, tensor_parallel_obstacle
from solo_vlm.train.parallel.vocabulary import split_head
from solo_vlm.utils.errors import SoloError

TOKENS = 512
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "first_k_dense_replace": 4,
}
# Heads are split; only the weights of attention and MLP are; latents stay whole; attention does.
MEASURED = {"llama": {}, "phi3": {"sliding_window": None}, "deepseek_v2": LATENT, "deepseek_v3": LATENT}


def solo_config(family, **settings):
    text_config = tiny_config(family, **settings)
    design = {"lm_head_bias": family == "phi", "vision_patch_size": 4}
    return SoloConfig(text_config=text_config, image_token_id=60, **design)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def count_parameters(plain, families, path):
    """Write the bytes of parameters that this process has of each family, and what is planned for them."""
    recipe, counted = Recipe.parse(plain), {}
    with init_distributed(recipe) as context:
        for family in families:
            config = solo_config(family)
            with torch.device("meta"):
                model = SoloForConditionalGeneration(config)
            shard_model(model, recipe, context)
            layout = Layout.of(config, recipe, context.dims)
            held, memory = sum(local(p).nbytes for p in model.parameters()), memory_per_device(layout, recipe)
            counted[family] = [held, memory.weights, memory.gradients, memory.optimizer // 2]
    path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps(counted))


def measure_activations(plain, path):
    """Write the bytes that this process saves of a forward pass, with those of its plan."""
    recipe, measured = Recipe.parse(plain), {}
    with init_distributed(recipe) as context:
        for family, settings in MEASURED.items():
            config = solo_config(family, **SIZES | settings)
            model = SoloForConditionalGeneration(config).to(torch.bfloat16).train()
            split_layers(model, context.mesh[TP])
            split_head(model, context.mesh[TP])
            ids = torch.full((1, TOKENS), config.image_token_id)
            pixels = torch.randint(256, (TOKENS, config.patch_dim), dtype=torch.uint8)
            batch = {"input_ids": ids, "pixel_values": pixels, "labels": ids, "use_cache": False}
            kept = kept_activations(Layout.of(config, recipe, context.dims), recipe)
            measured[family] = [kept, saved_bytes(model, batch) + pixels.nbytes]
    path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps(measured))


def saved_bytes(model, batch):
    """Return the bytes that autograd saves for the backward pass, without the parameters."""
    own = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # keeps the storage alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in saved.values())


def split_in_two(start, tmp_path, task, *arguments, **settings):
    """Run a task in two processes that split layers; return what they wrote."""
    plain = run_settings(tmp_path, tmp_path / "out", parallel={"tensor": 2}, **settings)
    assert start(2, task, plain, *arguments, tmp_path / "found").wait(400) == [0, 0]
    return [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(2)]


def is_counted(family):
    try:
        ModelShape.of(tiny_config(family))
    except SoloError:
        return False
    return True


@pytest.mark.distributed
def test_parameters_of_a_process_are_exact_in_every_family_that_is_split(start, tmp_path):
    families = [family for family in text_families() if tensor_parallel_obstacle(tiny_config(family)) is None]
    families = [family for family in families if is_counted(family)]
    assert len(families) >= 90
    for counted in split_in_two(start, tmp_path, count_parameters, families):
        wrong = {family: counts for family, counts in counted.items() if len(set(counts)) > 1}
        assert wrong == {}


@pytest.mark.distributed
def test_activations_of_a_process_match_autograd_saved_tensors(start, tmp_path):
    data = {"sources": [{"path": "x"}], "sequence_length": TOKENS, "streams": 8}
    settings = {"precision": "bf16", "data": data}
    for measured in split_in_two(start, tmp_path, measure_activations, **settings):
        for family, (kept, saved) in measured.items():
            assert kept == pytest.approx(saved, rel=0.05), family


@pytest.mark.parametrize(
    ("family", "attention", "query"),
    [("llama", 0.5, 0.5), ("phi3", 0.5, 1), ("youtu", 1, 1), ("granitemoe", 1, 1)],
)
def test_share_of_attention_follows_the_plan_of_the_family(family, attention, query):
    recipe = Recipe.parse({"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}})
    layout = Layout.of(tiny_config(family), recipe, ParallelDims(1, 2, 128))
    own, whole = layout.own, layout.shape
    assert own.parameters.attention == attention * whole.parameters.attention
    assert own.query == query * whole.query
    assert own.mlp == pytest.approx(whole.mlp * (1 if family == "phi3" else 0.5), abs=1)  # with its router
    split = whole.parameters.total - layout.replicated
    assert own.parameters.total == split / 2 + layout.replicated
