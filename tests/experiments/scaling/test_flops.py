"""FLOPs next to LLaVA: `solo scaling flops` for the paper's model and other decoders, and LLaVA's count."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.models.test_flops import DECODER, LENGTH, counted, not_causal
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from solo_vlm.experiments.scaling.flops import ClipShape, LlavaShape
from solo_vlm.models.flops import ModelShape, count_parameters


def test_solo_7b_and_llava_counts(run):
    status, out, _ = run("scaling", "flops", "--image", "1024x768", "--text-tokens", "100", "--json")
    assert status == 0
    facts = json.loads(out)
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        encoder = sum(parameter.numel() for parameter in CLIPVisionModel(clip).parameters())
    assert facts["parameters"]["encoder"] == encoder
    assert facts["parameters"]["connector"] == (1024 + 1) * 4096 + (4096 + 1) * 4096
    assert [sequence["length"] for sequence in facts["sequences"]] == [2048, 8192, 32768]

    (image,) = facts["images"]
    assert (image["rows"], image["columns"]) == (24, 32)
    solo, llava = image["solo"], image["llava"]
    assert (solo["tokens"], llava["tokens"]) == (24 * 32 + 24 + 1, 576)
    assert solo["patch_embedding"] == 2 * 3072 * 4096 * 24 * 32
    head = 2 * 4096 * 32064 * 100
    text = solo["with_text_forward"] - solo["forward"] - head
    decoder = facts["parameters"]["decoder"] - 2 * 32064 * 4096 - 65 * 4096
    attention = 4 * 4096 * 32 * sum(793 + i + 1 for i in range(100))
    assert text == 2 * decoder * 100 + attention
    assert llava["forward"] == llava["encoder"] + llava["connector"] + llava["decoder"]


def test_plain_llm_is_used_as_the_decoder(run, tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    config.save_pretrained(tmp_path)
    for option in (("--model", str(tmp_path)), ("--config", str(tmp_path / "config.json"))):
        facts = json.loads(run("scaling", "flops", *option, "--json")[1])
        assert facts["parameters"]["decoder"] == count_parameters(config).total
        assert facts["parameters"]["patch_embedding"] == 3072 * 64


def test_tables_are_printed(run):
    status, out, _ = run("scaling", "flops")
    assert status == 0
    assert "32,768" in out and "1024x1024" in out and "LLaVA" in out


def test_invalid_image_size_is_rejected(run):
    status, _, err = run("scaling", "flops", "--image", "1024")
    assert status == 2
    assert "WIDTHxHEIGHT" in err


def test_llava_flops_match_the_counter():
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=DECODER, image_token_index=300, vision_feature_layer=-2
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.model.vision_tower.requires_grad_(False)
    shape = LlavaShape(ClipShape(112, 14, 64, 192, 4), ModelShape.of(DECODER))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())

    ids = torch.randint(299, (1, LENGTH))
    ids[0, 4:68] = ids[0, 100:164] = 300
    pixels = torch.rand(2, 3, 112, 112)
    inputs = {"input_ids": ids, "pixel_values": pixels, "use_cache": False}
    flops = shape.flops([LENGTH], images=2, predicted=LENGTH)
    flops = replace(flops, decoder=not_causal(flops.decoder, LENGTH))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)
    expected = counted(lambda: model(**inputs).logits.sum())
    assert flops.training == pytest.approx(expected, rel=0.01)
