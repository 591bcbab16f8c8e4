"""Edited settings that contradict the tokenizer, or the LLM, are found in the row of settings alone."""

from __future__ import annotations

import pytest
from tests.factories import make_llm, make_solo

from solo_vlm.check.certificate import certify
from solo_vlm.check.probe import Probe
from solo_vlm.check.settings import settings
from solo_vlm.data.encode import Encoder


def failures(probe: Probe) -> dict:
    """Return the findings of the properties that fail."""
    found = certify(probe, "model").findings
    return {name: finding for name, finding in found.items() if finding.status == "fails"}


@pytest.mark.parametrize(
    ("setting", "value", "fault"),
    [
        ("suppress_tokens", None, "suppress_tokens lacks '<vpatch>'"),
        ("suppress_tokens", [1, *range(300, 320)], "suppress_tokens has '</s>' (1), an end"),
        ("eos_token_id", 50, "eos_token_id lacks '</s>' (1), where the chat template ends answers"),
        ("eos_token_id", [1, 50], "eos_token_id has 'O' (50), where no answer ends"),
        ("eos_token_id", [1, 312], "eos_token_id has '<vision>' (312), where no answer ends"),
        ("pad_token_id", 7, "pad_token_id = 7, but the tokenizer's is 1"),
        ("bos_token_id", 7, "bos_token_id = 7, but the tokenizer's is 0"),
    ],
    ids=str,
)
def test_settings_of_generation_that_contradict_the_tokenizer_are_found(setting, value, fault):
    solo = make_solo()
    probe = Probe(solo.model, Encoder(solo.processor))
    setattr(probe.model.generation_config, setting, value)
    found = failures(probe)
    assert found.keys() == {"settings"}
    assert found["settings"].detail.startswith(fault)


def test_setting_that_is_not_the_llms_is_found():
    """Even one that no short text shows."""
    llm, solo = make_llm("mistral")[0], make_solo("mistral")
    healthy = Probe(solo.model, Encoder(solo.processor), llm)
    assert settings(healthy).status == "holds"
    solo.model.config.text_config.max_position_embeddings = 4096
    found = failures(healthy)
    assert found.keys() == {"settings"}
    assert "max_position_embeddings = 4096 in config.json, but 512" in found["settings"].detail


def test_stop_token_that_an_llm_lacks_is_a_difference():
    """`solo init` adds it."""
    llm, tokenizer = make_llm()
    llm.generation_config.eos_token_id = None
    finding = settings(Probe(llm, Encoder(tokenizer)))
    assert finding.status == "differs"
    assert "eos_token_id lacks '</s>' (1)" in finding.detail
