"""Image-text models of transformers that are no SOLO models: as far as a property applies."""

from __future__ import annotations

import pytest
import torch
from tests.factories import TEXTS
from transformers import AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from solo_vlm.check.certificate import certify
from solo_vlm.check.loading import load_probe
from solo_vlm.check.probe import Probe
from solo_vlm.quickstart.llm import train_tokenizer

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 8}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
MODELS = {
    "llava": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION},
    "idefics3": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION},
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 8},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "qwen2_vl": {"text_config": {**TEXT, "rope_parameters": QWEN_ROPE}, "vision_config": QWEN_VISION},
    "paligemma": {
        "text_config": {"model_type": "gemma", **TEXT},
        "vision_config": VISION,
        "projection_dim": 64,
    },
}


def make_model(kind: str, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**MODELS[kind], "image_token_id": 300, **settings})
    return AutoModelForImageTextToText.from_config(config).eval()


def findings(probe: Probe) -> dict:
    certificate = certify(probe, "model")
    assert certificate.passed, certificate.as_dict()
    assert certificate.kind.startswith("image-text model")
    return dict(certificate.findings)


@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"paligemma"}))
def test_image_text_model_is_checked_on_text(kind):
    found = findings(Probe(make_model(kind)))
    for name in ("causality", "labels", "batching", "caching", "gradients", "saving"):
        assert found[name].status == "holds", found[name]
    for name in ("text_logits", "packing", "supervision", "patches"):
        assert found[name].status == "skipped", found[name]


def test_prefix_attention_is_named_as_a_difference():
    found = findings(Probe(make_model("paligemma")))
    assert found["causality"].status == "differs"
    assert "by design: tokens of a prompt see each other in both directions" in found["causality"].detail
    assert found["caching"].status == "skipped"


def test_packed_documents_that_only_transformers_mixes_are_a_difference():
    """Multi-axis positions do not restart from `position_ids` of one axis."""
    found = findings(Probe(make_model("qwen2_vl")))
    assert found["packing_by_transformers"].status == "differs"
    assert found["packing_by_transformers"].layer == "layer 0 (Qwen2VLDecoderLayer)"


def make_llava(folder, chat_template=None):
    """Write the folder of a tiny LLaVA with its processor."""
    tokenizer = train_tokenizer([*TEXTS, "Which letters are here?"], 320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=chat_template
    )
    processor.num_additional_image_tokens = 1  # CLIP's class token
    model = make_model("llava", image_token_id=image_token_id)
    model.resize_token_embeddings(512)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def test_image_text_folder_is_checked_with_its_processor(tmp_path):
    make_llava(tmp_path)
    probe = load_probe(str(tmp_path))
    found = findings(probe)
    assert found["patches"].detail == "another image changes the 16 image tokens, and no other place"
    # Llava reads the last but one layer of its vision tower.
    assert found["gradients"].status == "differs"
    assert "vision_tower" in found["gradients"].detail
