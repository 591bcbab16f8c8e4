"""Edited settings that contradict the tokenizer, or the LLM, are found in the row of settings alone."""

from __future__ import annotations

import pytest
from tests.check.test_probe import make_llava
from tests.factories import make_llm, make_solo

from solo_vlm.check.certificate import certify
from solo_vlm.check.loading import load_probe
from solo_vlm.check.probe import Probe
from solo_vlm.check.settings import settings
from solo_vlm.data.encode import Encoder
from solo_vlm.models.from_llm import compose


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
        ("min_new_tokens", 9, "min_new_tokens = 9 of generation_config.json lets no answer end before"),
        ("bad_words_ids", [[50]], "suppress_tokens or bad_words_ids has 'O' (50), which answers need"),
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


def test_end_in_config_json_that_ends_no_answer_is_found():
    solo = make_solo()
    probe = Probe(solo.model, Encoder(solo.processor))
    solo.model.config.text_config.eos_token_id = 50
    found = failures(probe)
    assert found.keys() == {"settings"}
    assert found["settings"].detail.startswith("eos_token_id of config.json has 'O' (50)")


def test_padding_token_of_images_is_found():
    solo = make_solo()
    tokenizer, generation = solo.processor.tokenizer, solo.model.generation_config
    tokenizer.pad_token = "<vpatch>"
    generation.pad_token_id = tokenizer.pad_token_id
    finding = settings(Probe(solo.model, Encoder(solo.processor)))
    assert finding.status == "fails"
    assert finding.detail.startswith("the padding token '<vpatch>' is one of images")


@pytest.mark.parametrize(
    ("setting", "value", "fault"),
    [
        ("suppress_tokens", "fewer", "suppress_tokens lacks 'Y' (60), which the LLM never answers: add it"),
        ("suppress_tokens", "more", "suppress_tokens has 'c' (70), which the LLM may answer: remove it"),
        (
            "begin_suppress_tokens",
            None,
            "begin_suppress_tokens = None in generation_config.json",
        ),
        (
            "forced_bos_token_id",
            60,
            "forced_bos_token_id = 60 in generation_config.json",
        ),
    ],
    ids=str,
)
def test_restrictions_of_answers_that_are_not_the_llms_are_found(setting, value, fault):
    (llm, _), (own, tokenizer) = make_llm(), make_llm()
    for each in (llm, own):
        each.generation_config.suppress_tokens, each.generation_config.begin_suppress_tokens = [60], [62]
    solo = compose(own, tokenizer)
    probe = Probe(solo.model, Encoder(solo.processor), llm)
    assert settings(probe).status == "holds", settings(probe)
    suppressed = solo.model.generation_config.suppress_tokens
    named = {"fewer": [one for one in suppressed if one != 60], "more": [*suppressed, 70]}
    setattr(solo.model.generation_config, setting, named.get(value, value))
    finding = settings(probe)
    assert finding.status == "fails"
    assert finding.detail.startswith(fault)


@pytest.mark.parametrize(
    ("setting", "value", "fault"),
    [
        ("eos_token_id", 9999, "eos_token_id = 9999 is not in the vocabulary of 311 tokens: remove it"),
        ("eos_token_id", [1, 50], "eos_token_id has 'O' (50), where no answer ends: remove it"),
        ("suppress_tokens", [1], "suppress_tokens has '</s>' (1), an end of answers: remove it"),
    ],
    ids=str,
)
def test_settings_of_an_llm_that_cut_answers_or_never_end_them_are_found(setting, value, fault):
    llm, tokenizer = make_llm()
    setattr(llm.generation_config, setting, value)
    finding = settings(Probe(llm, Encoder(tokenizer)))
    assert (finding.status, finding.detail) == ("fails", fault)


def test_settings_of_another_image_text_model_are_checked(tmp_path):
    make_llava(tmp_path)
    probe = load_probe(str(tmp_path))
    assert settings(probe).status == "holds"
    probe.model.generation_config.eos_token_id = [1, 50]
    assert settings(probe).detail.startswith("eos_token_id has 'O' (50), where no answer ends")


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
