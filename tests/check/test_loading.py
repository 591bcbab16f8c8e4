"""Loading of anything that can be checked."""

from __future__ import annotations

import pytest
from tests.factories import make_llm
from transformers import LlamaConfig, T5Config

from solo_vlm.check.certificate import certify
from solo_vlm.check.loading import load_probe
from solo_vlm.utils.errors import SoloError


def test_configuration_alone_gets_random_weights(tmp_path):
    make_llm()[0].config.save_pretrained(tmp_path)
    probe = load_probe(str(tmp_path / "config.json"))
    certificate = certify(probe, "config.json")
    assert certificate.passed
    assert certificate.kind == "LLM (llama, random weights)"


def test_large_configuration_is_checked_at_the_sizes_of_a_tiny_model(tmp_path):
    LlamaConfig(num_hidden_layers=80, hidden_size=8192).save_pretrained(tmp_path)
    probe = load_probe(str(tmp_path / "config.json"))
    assert probe.model.num_parameters() < 10**7
    assert "tiny" in certify(probe, "config.json").kind


def test_configuration_of_an_encoder_and_decoder_is_rejected(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(SoloError, match="t5"):
        load_probe(str(tmp_path / "config.json"))


def test_llm_without_a_tokenizer_is_checked_on_random_labels(tmp_path):
    make_llm()[0].save_pretrained(tmp_path)
    probe = load_probe(str(tmp_path))
    assert probe.encoder is None
    assert certify(probe, "llm").findings["labels"].status == "holds"
