"""FLOPs and parameters of LLaVA agree with torch's counter on the real model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.models.test_flops import DECODER, LENGTH, counted, not_causal
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from solo_vlm.experiments.scaling.llava import ClipShape, LlavaShape
from solo_vlm.models.flops import ModelShape


def test_llava_agrees_with_the_counter():
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
