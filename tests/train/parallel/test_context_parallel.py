"""Context parallelism: slices of rows match whole rows, in every family, or are rejected."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from tests.factories import (
    make_llm,
    make_solo,
    png,
    read_steps,
    run_recipe,
    run_settings,
    text_rows,
    write_training_data,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM, MistralConfig

from solo_vlm.check.certificate import require_exact_slices
from solo_vlm.check.probe import random_document
from solo_vlm.check.tiny import text_families, tiny_config, tiny_llm
from solo_vlm.data.collate import collate, num_supervised_tokens
from solo_vlm.models.from_llm import ImageDesign, compose
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train import Recipe
from solo_vlm.train.activation_checkpointing import prepare_layers
from solo_vlm.train.parallel.context import init_distributed
from solo_vlm.train.parallel.context_parallel import (
    check_context_parallel,
    context_parallel_obstacle,
    exchange_heads,
)
from solo_vlm.train.parallel.sharding import load_full_state_dict, shard_model
from solo_vlm.train.trainer import forward_backward
from solo_vlm.utils.errors import SoloError


def packed_row(config, length=48):
    """Return a row of documents that lie across cuts at half and quarters."""
    documents = [random_document(config, [size], False, seed) for seed, size in enumerate((9, 11, 17, 4))]
    return collate(documents, length, 5)


def loss_and_gradients(model, row, part=(0, 1)):
    (loss,) = forward_backward(model, [row], num_supervised_tokens([row]), nullcontext(), None, part)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, {n: (g.full_tensor() if isinstance(g, DTensor) else g) for n, g in gradients.items()}


def compare_families(plain, families, path):
    """Write what differs between slices of a row and the row, by family."""
    recipe = Recipe.parse(plain)
    result = {}
    with init_distributed(recipe) as context:
        for family in families:
            source = tiny_llm(family)  # without dropout
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
            shard_model(model, recipe, context)
            state = source.state_dict() if context.is_main_process else {}
            load_full_state_dict(model, state, dict(source.named_buffers()), context.device)
            isolate_documents(model.eval())
            exchange_heads(model, context.slices)
            row = packed_row(source.config)
            part = (context.cp_rank, context.dims.cp)
            try:
                own, gradients = loss_and_gradients(model, row, part)
            except Exception as error:  # the same in all processes
                result[family] = [f"{type(error).__name__}: {error}"]
                continue
            (loss,) = context.sum_slices(own)
            isolate_documents(source)
            expected, wanted = loss_and_gradients(source, row)
            found = [] if loss == pytest.approx(expected, rel=1e-5) else [f"loss {loss}, not {expected}"]
            least = 1e-3 * sum(gradient.norm() ** 2 for gradient in wanted.values()) ** 0.5
            for name, gradient in wanted.items():
                error = (gradients[name] - gradient).norm() / max(gradient.norm(), least)
                found += [f"gradient of {name}: relative error {error:.1e}"] if error > 1e-4 else []
            result[family] = found[:3]
    path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps(result))


def compare(start, tmp_path, size, families, **parallel):
    plain = run_settings(tmp_path, tmp_path / "out", parallel=parallel)
    assert start(size, compare_families, plain, families, tmp_path / "found").wait(900) == [0] * size
    return json.loads((tmp_path / "found-0").read_text())


@pytest.fixture(scope="module")
def obstacles():
    return {family: context_parallel_obstacle(tiny_config(family)) for family in text_families()}


def test_families_are_supported_or_rejected_with_a_reason(obstacles):
    assert sum(reason is None for reason in obstacles.values()) >= 85
    assert obstacles["mamba"].startswith("MambaMixer looks at other tokens in another way")
    assert obstacles["llama4_text"]


@pytest.mark.distributed
def test_slices_of_all_families_match_whole_rows(obstacles, start, tmp_path):
    families = [family for family, reason in obstacles.items() if reason is None]
    found = compare(start, tmp_path, 2, families, context=2)
    assert {family: found[family] for family in families if found[family]} == {}


@pytest.mark.distributed
def test_more_processes_than_key_heads_match_whole_rows(start, tmp_path):
    """Sinks, capped scores, latent attention and a single key head, over two and four key heads."""
    families = ["gpt_oss", "gemma2", "deepseek_v2", "gpt_bigcode", "qwen3"]
    assert compare(start, tmp_path, 4, families, context=4) == {family: [] for family in families}


def large_image_rows(count):
    """Return rows with images of 2 to 20 patches, whose colors differ by patch."""
    rows = []
    for number in range(count):
        shape = (32 * (1 + number % 4), 32 * (2 + number % 3), 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        content = [{"type": "image", "text": None}, {"type": "text", "text": "seven " * (number % 3)}]
        answer = [{"type": "text", "text": ("red", "blue")[number % 2]}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [{"bytes": png(Image.fromarray(pixels)), "path": None}]})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with images that lie across cuts, and models of several designs and families."""
    folder = tmp_path_factory.mktemp("slices")
    write_training_data(folder, large_image_rows(96), text_rows(64))
    designs = {
        "bidirectional": ImageDesign(image_attention="bidirectional"),
        "2d": ImageDesign(image_positions="2d"),
        "conv": ImageDesign(patch_embedding="conv", image_attention="bidirectional", image_positions="2d"),
    }
    for name, design in designs.items():
        llm, tokenizer = make_llm("qwen3")
        solo = compose(llm, tokenizer, design=design)
        solo.save(folder / name)
    for family in ("llama", "mistral", "qwen3", "qwen3_moe"):
        make_solo(family).save(folder / family)
    make_llm("qwen3")[0].save_pretrained(folder / "llm")
    make_llm("qwen3")[1].save_pretrained(folder / "llm")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "bidirectional"},
        {"model": "2d"},
        {"model": "conv"},
        {"model": "qwen3_moe", "router_aux_loss": 1.0},
        {"model": "mistral", "lora": {"rank": 2}},
        {"model": "mistral", "activation_checkpointing": "full"},
        {"model": "llama", "compile": True, "activation_checkpointing": "selective"},
        {"model": "qwen3", "compile": True, "activation_checkpointing": "full"},
        {"model": "llama", "validation": {"sources": [{"path": "images.parquet"}], "interval": 2}},
        {"model": "llm", "data": {"sources": [{"path": "text.parquet"}]}},
    ],
    ids=str,
)
@pytest.mark.distributed
def test_images_and_settings_across_cuts_match_single_process(folder, tmp_path, start, changes):
    def settings(name, parallel):
        plain = run_settings(folder, tmp_path / name, parallel=parallel)
        data = plain["data"] | changes.get("data", {})
        return plain | {"steps": 6} | changes | {"data": data}

    group = start(2, run_recipe, settings("shared", {"context": 2}))
    assert start(1, run_recipe, settings("alone", {})).wait() == [0]
    assert group.wait() == [0, 0]
    ours, theirs = (read_steps(tmp_path / name) for name in ("shared", "alone"))
    names = ["loss", "gradient_norm", "validation_loss", *(n for n in theirs[0] if n.startswith("moe/"))]
    for mine, right in zip(ours, theirs, strict=True):
        kept = [name for name in names if name in right]
        assert [mine[name] for name in kept] == pytest.approx([right[name] for name in kept], rel=1e-4)


def count_exchanges(plain, path):
    """Write the all-to-alls per layer of a forward and backward pass, without and with recomputation."""
    recipe = Recipe.parse(plain)
    counted = []
    with init_distributed(recipe) as context:
        for mode in ("none", "full"):
            model = tiny_llm("llama")
            shard_model(model, recipe, context)
            isolate_documents(model)
            exchange_heads(model, context.slices)
            prepare_layers(model, mode)
            with CommDebugMode() as communication:
                loss_and_gradients(model, packed_row(model.config), (context.cp_rank, 2))
            exchanges = communication.get_comm_counts()[torch.ops.c10d_functional.all_to_all_single]
            counted.append(exchanges / model.config.num_hidden_layers)
    path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps(counted))


@pytest.mark.distributed
def test_a_layer_needs_four_exchanges_or_six_with_recomputation(start, tmp_path):
    plain = run_settings(tmp_path, tmp_path / "out", parallel={"context": 2})
    assert start(2, count_exchanges, plain, tmp_path / "counted").wait() == [0, 0]
    assert [json.loads((tmp_path / f"counted-{rank}").read_text()) for rank in range(2)] == [[4, 6]] * 2


def test_indivisible_heads_are_rejected_with_supported_sizes():
    config = MistralConfig(num_hidden_layers=1, num_attention_heads=12, head_dim=128)
    with pytest.raises(SoloError, match=r"its 12 attention heads are not divisible by 8; .* to 1 or 2 or 4"):
        check_context_parallel(config, 8)
    with pytest.raises(SoloError, match=r"12 attention heads / parallel.tensor = 2 are not divisible by 4"):
        check_context_parallel(config, 4, tensor=2)
    check_context_parallel(config, 4)


def test_rotary_embeddings_by_document_length_are_rejected():
    config = tiny_config("phi3")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config.rope_parameters = dynamic
    assert context_parallel_obstacle(config) == "its rotary embeddings depend on the length of documents"


def test_layers_that_look_at_other_tokens_outside_attention_are_rejected():
    """No family that passes the check by configuration does so; a new one might."""
    model = make_solo("llama").model
    require_exact_slices(model, "a", 2)
    model.model.language_model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + inputs[0].roll(1, 1)
    )
    with pytest.raises(SoloError, match=r"slices of a row differ .* outside attention; set it to 1"):
        require_exact_slices(model, "a", 2)
