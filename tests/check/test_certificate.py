"""The certificate finds planted faults in the row they belong to, and passes healthy models."""

from __future__ import annotations

from functools import wraps

import numpy as np
import pytest
import torch
from tests.factories import LLM_CONFIGS, make_llm, make_solo
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from solo_vlm.check import layers
from solo_vlm.check.certificate import (
    OF_FAMILY,
    OF_INIT,
    PROPERTIES,
    Certificate,
    certify,
    certify_init,
    require_exact_packing,
)
from solo_vlm.check.probe import Probe
from solo_vlm.check.properties import caching, causality, gradients, labels, packing
from solo_vlm.check.tiny import text_families, tiny_llm
from solo_vlm.data.encode import Encoder
from solo_vlm.models.from_llm import ImageDesign, compose
from solo_vlm.models.packed.attention import packed_attention
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.packed.recurrence import PackedRow
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.models.solo.modeling_solo import PACKED_ATTENTION
from solo_vlm.utils.errors import SoloError

HEALTHY = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("olmo2", "granite", "cohere", "starcoder2", "glm4", "smollm3", "deepseek_v3"),
)


# Sinks, latent and chunked attention, state spaces, linear attention, convolutions, learned positions, ALiBi.
PACKED = (
    *("gpt_oss", "nemotron_h", "bamba", "jamba", "granitemoehybrid", "lfm2", "falcon_h1", "mamba2", "bloom"),
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma3n_text", "gemma4_text", "llama4_text", "gpt2"),
    *("kimi_linear", "deepseek_v2", "olmo3", "gpt_neox", "opt", "minimax"),
)


@pytest.fixture
def probe():
    """Return a SOLO model to plant a fault in, with windows of 8 tokens."""
    solo = make_solo("mistral")
    return Probe(solo.model, Encoder(solo.processor))


def failures(probe: Probe) -> dict:
    """Return the findings of the properties that fail."""
    found = certify(probe, "model").findings
    return {name: finding for name, finding in found.items() if finding.status == "fails"}


def plant_in_training(monkeypatch, attention, layer: int = 1) -> None:
    """Replace the training attention in one layer."""

    def faulty(module, *args, **kwargs):
        return (attention if module.layer_idx == layer else packed_attention)(module, *args, **kwargs)

    def isolate(model):
        isolate_documents(model)
        AttentionInterface.register(PACKED_ATTENTION, faulty)

    monkeypatch.setattr(layers, "isolate_documents", isolate)


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_healthy_solo_model_passes_everything(family):
    solo = make_solo(family)
    certificate = certify(Probe(solo.model, Encoder(solo.processor)), family)
    assert certificate.passed, certificate.as_dict()
    statuses = {name: finding.status for name, finding in certificate.findings.items()}
    assert statuses == {**dict.fromkeys(PROPERTIES, "holds"), "text_logits": "skipped"}


@pytest.mark.parametrize(
    "design",
    [
        {"image_attention": "bidirectional"},
        {"image_positions": "2d"},
        {"patch_embedding": "conv"},
        {"image_attention": "bidirectional", "image_positions": "2d", "patch_embedding": "conv"},
    ],
    ids=str,
)
def test_every_design_of_images_passes(design):
    solo = compose(*make_llm("mistral"), design=ImageDesign(**design))
    certificate = certify(Probe(solo.model, Encoder(solo.processor)), "model")
    assert certificate.passed, certificate.as_dict()
    assert certificate.findings["patches"].status == "holds"


@pytest.mark.parametrize("size", [{"longest_edge": 32}, {"height": 64, "width": 96}])
def test_patches_are_checked_at_any_image_size(size):
    llm, tokenizer = make_llm()
    solo = compose(llm, tokenizer, image_processor=SoloImageProcessor(size=size))
    certificate = certify(Probe(solo.model, Encoder(solo.processor)), "model")
    assert certificate.passed, certificate.as_dict()
    assert certificate.findings["patches"].status == "holds"


@pytest.mark.parametrize("family", HEALTHY)
def test_healthy_llm_passes_everything(family):
    certificate = certify(Probe(tiny_llm(family)), family)
    assert certificate.passed, certificate.as_dict()


@pytest.mark.parametrize("family", PACKED)
def test_family_trains_exactly_on_packed_documents(family):
    """Causal, labels shifted once, and gradients reach every parameter, too."""
    probe = Probe(tiny_llm(family))
    for check in (causality, packing, labels, gradients):
        assert check(probe).status == "holds", check(probe)


@pytest.mark.slow
@pytest.mark.parametrize("family", text_families())
def test_every_family_is_exact_or_rejected(family):
    probe = Probe(tiny_llm(family))
    assert causality(probe).status == "holds"
    try:
        require_exact_packing(probe.model, family)
    except SoloError as error:
        assert "see solo check" in str(error)
    else:
        assert packing(probe).status == labels(probe).status == "holds"


def test_labels_shifted_twice_are_found(probe, monkeypatch):
    forward = probe.model.forward

    @wraps(forward)
    def shift_again(*args, labels=None, **kwargs):
        if labels is not None:
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
        return forward(*args, labels=labels, **kwargs)

    monkeypatch.setattr(probe.model, "forward", shift_again)
    found = failures(probe)
    assert found.keys() == {"labels"}
    assert "not shifted exactly once" in found["labels"].detail


def test_labels_shifted_by_the_encoder_are_found(probe, monkeypatch):
    for document in probe.encoded:
        document.labels[:-1] = document.labels[1:].copy()
    found = failures(probe)
    assert found.keys() == {"supervision"}
    assert found["supervision"].detail == "a label is not the token at its own position"


def test_mask_that_leaks_one_document_is_found(probe, monkeypatch):
    def leaky(module, *args, cu_seq_lens_q, **kwargs):
        bounds = torch.cat([cu_seq_lens_q[:1], cu_seq_lens_q[2:]])  # joins the first two documents
        return packed_attention(module, *args, cu_seq_lens_q=bounds, **kwargs)

    plant_in_training(monkeypatch, leaky)
    found = failures(probe)
    assert found.keys() == {"packing"}
    assert found["packing"].layer == "layer 1 (MistralDecoderLayer)"
    assert "document 2 of 3" in found["packing"].detail


def test_dropped_sinks_are_found(monkeypatch):
    def without_sinks(*args, s_aux=None, **kwargs):
        return packed_attention(*args, **kwargs)

    plant_in_training(monkeypatch, without_sinks, layer=0)
    found = failures(Probe(tiny_llm("gpt_oss")))
    assert "layer 0" in found["packing"].layer


def test_causal_mask_off_by_one_is_found(probe):
    """The fault is in one layer of the model's own attention."""

    def off_by_one(module, query, key, value, attention_mask, **kwargs):
        if module.layer_idx == 1:
            attention_mask = torch.cat([attention_mask[:, :, 1:], attention_mask[:, :, -1:]], 2)
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("off_by_one", off_by_one)
    AttentionMaskInterface.register("off_by_one", eager_mask)
    probe.model.set_attn_implementation("off_by_one")
    finding = failures(probe)["causality"]
    assert finding.layer == "layer 1 (MistralDecoderLayer)"


def test_future_tokens_in_the_training_attention_are_found(probe, monkeypatch):
    def see_future(module, query, key, value, *args, **kwargs):
        ahead = [torch.cat([states[:, :, 1:], states[:, :, -1:]], 2) for states in (key, value)]
        return packed_attention(module, query, *ahead, *args, **kwargs)

    plant_in_training(monkeypatch, see_future)
    found = failures(probe)
    assert found.keys() == {"packing"}
    assert found["packing"].layer == "layer 1 (MistralDecoderLayer)"


def test_cache_that_forgets_a_token_is_found(probe):
    def forgetful(module, query, key, value, attention_mask, **kwargs):
        if module.layer_idx == 1 and query.shape[2] == 1:
            key = torch.cat([key[:, :, :1], key[:, :, :-1]], 2)
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("forgetful", forgetful)
    AttentionMaskInterface.register("forgetful", eager_mask)
    probe.model.set_attn_implementation("forgetful")
    found = failures(probe)
    assert found.keys() == {"caching"}
    assert found["caching"].layer == "layer 1 (MistralDecoderLayer)"


@pytest.mark.parametrize(("index_topk", "status"), [(16, "differs"), (64, "holds")])
def test_ties_of_sparse_attention_are_no_fault_of_the_cache(index_topk, status):
    """Few heads of the indexer give many tokens the score zero."""
    finding = caching(Probe(tiny_llm("glm_moe_dsa", index_topk=index_topk, index_n_heads=4)))
    assert finding.status == status
    assert ("breaks ties" in finding.detail) == (status == "differs")


def test_padding_that_is_not_masked_is_found():
    """The recurrent layers of RecurrentGemma read padding on the left as tokens."""
    found = failures(Probe(tiny_llm("recurrent_gemma")))
    assert found.keys() == {"batching"}
    assert found["batching"].layer == "layer 0 (RecurrentGemmaDecoderLayer)"


def test_wrong_patch_order_is_found(probe, monkeypatch):
    encode_image = SoloImageProcessor.encode_image

    def by_columns(self, source, **options):
        patches, grid = encode_image(self, source, **options)
        _, rows, columns = grid
        return patches.reshape(rows, columns, -1).swapaxes(0, 1).reshape(len(patches), -1), grid

    monkeypatch.setattr(SoloImageProcessor, "encode_image", by_columns)
    found = failures(probe)
    assert found.keys() == {"patches"}
    assert found["patches"].layer == "embeddings"
    assert "patch 1 of 9" in found["patches"].detail


@pytest.mark.parametrize(
    ("setting", "value"), [("image_mean", [0.5, 0.5, 0.5]), ("vision_row_token_id", 50)], ids=str
)
def test_disagreement_of_model_and_processor_is_found(probe, setting, value):
    setattr(probe.model.config, setting, value)
    assert "in config.json" in failures(probe)["patches"].detail


def test_template_that_drops_the_system_message_is_found(probe):
    template = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list -%}"
    probe.encoder.processor.chat_template = template + probe.encoder.processor.chat_template
    found = failures(probe)
    assert found.keys() == {"template"}
    assert found["template"].detail.startswith("leaves out the system message of a chat (system, user)")


def test_padding_on_the_right_is_found(probe):
    probe.encoder.tokenizer.padding_side = "right"
    found = failures(probe)
    assert found.keys() == {"batching"}
    assert "padded on the right" in found["batching"].detail


def test_template_that_supervises_the_user_is_found(probe, monkeypatch):
    encode_chat = probe.encoder.processor.encode_chat

    def supervise_all(*args, **kwargs):
        chat = encode_chat(*args, **kwargs)
        is_text = np.isin(chat.input_ids, probe.encoder.vision_ids, invert=True)
        return type(chat)(chat.input_ids, is_text)

    monkeypatch.setattr(probe.encoder.processor, "encode_chat", supervise_all)
    found = failures(probe)
    assert found.keys() == {"supervision"}
    assert "where the answer is 'Only quiet zebras jump.'" in found["supervision"].detail


def test_gradient_that_is_not_finite_is_found(probe):
    """NaN is true, so it could pass for a gradient that reaches its parameter."""
    layer = probe.model.model.language_model.layers[0]

    def divide_by_zero(module, args, output):
        return output + (output * 0).sqrt()  # only in the backward pass

    layer.register_forward_hook(divide_by_zero)
    finding = gradients(probe)
    assert finding.status == "fails"
    assert finding.detail.startswith("not finite (NaN or infinite) for ")


def test_gradients_that_overflow_at_an_embedding_of_zeros_are_found():
    """A document's first token sees only itself, so each norm multiplies its gradient by a thousand."""
    solo = make_solo(num_hidden_layers=16)
    with torch.no_grad():
        solo.model.get_input_embeddings().weight[0] = 0.0  # BOS
    finding = gradients(Probe(solo.model, Encoder(solo.processor)))
    assert finding.status == "fails"
    assert finding.detail.endswith("the embedding of token 0 is zero: initialize it")


def test_error_inside_a_model_is_one_finding(probe, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(probe.model.model.language_model.layers[0], "forward", broken)
    found = failures(probe)
    assert found["causality"].detail == "RuntimeError: no kernel"
    assert found.keys() == set(PROPERTIES) - {"text_logits", "settings", "template", "supervision", "patches"}


def test_packing_that_is_not_exact_is_rejected_before_training(probe, monkeypatch):
    require_exact_packing(probe.model, "runs/model")

    def leaky(module, *args, cu_seq_lens_q, **kwargs):
        return packed_attention(module, *args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)

    plant_in_training(monkeypatch, leaky)
    with pytest.raises(
        SoloError,
        match=r"runs/model: packed training .* mistral: document 2 of 3 .*layer 1.*solo check runs/model",
    ):
        require_exact_packing(probe.model, "runs/model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_model_is_checked_in_its_own_precision(dtype):
    solo = make_solo()
    certificate = certify_init(solo.model.to(dtype), solo.processor, "llm")
    assert certificate.passed, certificate.as_dict()
    assert certificate.findings.keys() == {*OF_INIT, *OF_FAMILY}


def test_new_model_is_checked_with_its_design_of_images(monkeypatch):
    def causal(*args, image_index=None, **kwargs):
        return packed_attention(*args, **kwargs)

    plant_in_training(monkeypatch, causal)
    monkeypatch.setattr(PackedRow, "images", None)
    for attention, status in (("causal", "holds"), ("bidirectional", "fails")):
        solo = compose(*make_llm("gemma2"), design=ImageDesign(attention))
        assert certify_init(solo.model, solo.processor, "llm").findings["packing"].status == status


def test_check_leaves_the_model_as_it_was(probe):
    settings = {**probe.model.config.to_dict(), "architectures": ["SoloForConditionalGeneration"]}
    attention = probe.model.config.text_config._attn_implementation
    certify(probe, "model")
    assert probe.model.config.to_dict() == settings
    assert probe.model.config.text_config._attn_implementation == attention
    assert not any(parameter.grad is not None for parameter in probe.model.parameters())
    for module in probe.model.modules():
        assert not module._forward_hooks
        assert not {"forward", "packed_row"} & vars(module).keys()


def test_left_out_property_is_skipped(probe):
    certificate = certify(probe, "model", leave_out=("saving",))
    assert certificate.findings["saving"].status == "skipped"
    assert certificate.passed


def test_certificate_is_plain_json():
    assert Certificate("model", "LLM (llama)", {}, 0.123).as_dict() == {
        "model": "model",
        "kind": "LLM (llama)",
        "passed": True,
        "seconds": 0.12,
        "properties": {},
    }
