"""`solo scaling flops` for the paper's model and for other decoders."""

from __future__ import annotations

import json

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from solo_vlm.models.flops import count_parameters


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
