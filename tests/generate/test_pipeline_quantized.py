"""Quantized decoders approximate the full model; patch embedding and LM head keep full precision."""

from __future__ import annotations

import asyncio

import pytest
import torch
from serving import run_sequentially, served
from tests import factories as tiny

from solo_vlm.generate import GenerationPipeline, PrefixCache

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'solo-vlm[quantize]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes warns of missing CPU kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "solo"
    with pytest.MonkeyPatch.context() as patch:  # 4-bit blocks have 64 values
        for name, size in {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}.items():
            patch.setitem(tiny.SIZES, name, size)
        tiny.make_solo("llama").save(path)
    return path


@pytest.mark.parametrize(
    "kind, layer, similarity", [("int8", "Linear8bitLt", 0.995), ("nf4", "Linear4bit", 0.9)]
)
def test_quantized_model_approximates_full_model(folder, picture, kind, layer, similarity):
    full = GenerationPipeline.from_pretrained(folder)
    quantized = GenerationPipeline.from_pretrained(folder, quantize=kind, prefix_cache=PrefixCache())
    decoder = quantized.model.model.language_model.layers[0]
    assert type(decoder.self_attn.q_proj) is type(decoder.mlp.up_proj) is getattr(bitsandbytes.nn, layer)
    assert type(quantized.model.lm_head) is torch.nn.Linear
    patch_embedding = quantized.model.model.embed_vision_patch
    assert torch.equal(patch_embedding.weight, full.model.model.embed_vision_patch.weight)

    chat = tiny.ask("what is this?", picture(96, 64))
    with torch.inference_mode():
        expected, ours = (one.model(**one.encode([chat])).logits.flatten() for one in (full, quantized))
    assert torch.cosine_similarity(ours, expected, dim=0) > similarity
    first = quantized.stream(chat, lambda text: None, 4)
    again = quantized.stream(chat, lambda text: None, 4)
    assert (first.cached_tokens, again.cached_tokens) == (0, again.prompt_tokens - 1)


def test_generate_command_accepts_quantize(run, folder):
    code, out, _ = run(
        *("generate", "--model", folder, "--quantize", "nf4", "--prompt", "hi", "--max-new-tokens", 2)
    )
    assert code == 0
    assert out.strip()


@pytest.mark.slow
def test_serve_command_accepts_quantize(folder):
    request = {"messages": [{"role": "user", "content": "a red circle"}], "max_tokens": 12}
    with served(folder, "--quantize", "nf4") as server:
        (answer,) = asyncio.run(run_sequentially(server.url, [request])).answers
    full, quantized = (
        GenerationPipeline.from_pretrained(folder, quantize=kind).answer([tiny.ask("a red circle")], 12)[0]
        for kind in (None, "nf4")
    )
    assert answer[1] == quantized != full
