"""Ends of answers: settings are completed from the chat template, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.factories import image_rows, make_llm, make_solo, run_settings, text_rows, write_training_data
from tokenizers import Tokenizer

from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.from_llm import compose, from_llm
from solo_vlm.models.load import load_model, save_model
from solo_vlm.models.stops import stop_ids
from solo_vlm.utils.errors import SoloError


def test_stop_ids_are_unique():
    solo = make_solo()
    eos = solo.processor.tokenizer.eos_token_id
    settings = type("Settings", (), {"eos_token_id": eos})
    assert stop_ids(settings) == [eos]
    assert stop_ids(settings, solo.processor) == [eos]
    assert stop_ids(type("Settings", (), {"eos_token_id": [7, eos]}), solo.processor) == [7, eos]
    assert stop_ids(object()) == []


def edit_generation(folder: Path, **settings) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("setting", "value", "fault"),
    [
        ("eos_token_id", [1, 50], r"eos_token_id has 'O' \(50\), where no answer ends: remove it"),
        ("eos_token_id", [1, 312], r"eos_token_id has '<vision>' \(312\), where no answer ends: remove it"),
        ("suppress_tokens", [1], r"suppress_tokens has '</s>' \(1\), an end of answers: remove it"),
    ],
    ids=str,
)
def test_settings_that_would_cut_answers_or_never_end_them_are_refused(setting, value, fault, run, tmp_path):
    """Before any answer, and before training."""
    make_solo().save(tmp_path / "llama")
    edit_generation(tmp_path / "llama", **{setting: value})
    with pytest.raises(SoloError, match=f"llama: generation_config.json: {fault}"):
        GenerationPipeline.from_pretrained(tmp_path / "llama", device="cpu")
    write_training_data(tmp_path, image_rows(1), text_rows(2))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(run_settings(tmp_path, tmp_path / "run")))
    code, _, errors = run("train", recipe)
    assert code == 2
    assert f"{setting} has" in " ".join(errors.split())


@pytest.mark.parametrize("setting", ["eos_token_id", "suppress_tokens"])
def test_what_settings_lack_is_added(setting, tmp_path):
    """Answers of an edited folder end, and have no tokens of images."""
    make_solo().save(tmp_path / "solo")
    own = getattr(load_model(tmp_path / "solo", device="cpu").generation_config, setting)
    edit_generation(tmp_path / "solo", **{setting: None})
    pipeline = GenerationPipeline.from_pretrained(tmp_path / "solo", device="cpu")
    assert getattr(pipeline.model.generation_config, setting) == own


def test_trained_llm_ends_where_its_documents_do(tmp_path):
    llm, tokenizer = make_llm()
    llm.generation_config.eos_token_id = 7
    save_model(tmp_path, llm, tokenizer)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [7, 1]


def test_init_keeps_the_tokens_that_an_llm_never_answers():
    llm, tokenizer = make_llm()
    llm.generation_config.suppress_tokens, llm.generation_config.begin_suppress_tokens = [60, 61], [62]
    settings = compose(llm, tokenizer).model.generation_config
    assert {60, 61} < set(settings.suppress_tokens)
    assert settings.begin_suppress_tokens == [62]


@pytest.mark.parametrize(
    ("setting", "value", "fault"),
    [
        ("suppress_tokens", [1], r"suppress_tokens has '</s>' \(1\), an end of answers"),
        ("suppress_tokens", [9999], "suppress_tokens .* has 9999, which is no token"),
        ("bad_words_ids", [[60, 61]], r"bad_words_ids = \[\[60, 61\]\] .* is not supported: remove it"),
        ("forced_bos_token_id", 60, "forced_bos_token_id = 60 .* is not supported: remove it"),
    ],
    ids=str,
)
def test_init_refuses_restrictions_that_no_answer_could_follow(setting, value, fault):
    llm, tokenizer = make_llm()
    setattr(llm.generation_config, setting, value)
    with pytest.raises(SoloError, match=fault):
        compose(llm, tokenizer)


def test_init_leaves_out_an_end_that_would_cut_answers(caplog, tmp_path):
    """Also that of config.json, which is often the default of its class."""
    llm, tokenizer = make_llm()
    llm.generation_config.eos_token_id = llm.config.eos_token_id = [50, 1]
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    solo = from_llm(tmp_path)
    assert solo.model.generation_config.eos_token_id == [1]
    assert solo.model.config.text_config.eos_token_id == 1
    assert "the LLM stops at 'O' (50), where no answer ends: left out" in caplog.text


def test_token_of_reasoning_is_no_end(caplog):
    """It is in the middle of an answer."""
    llm, tokenizer = make_llm()
    tokenizer.add_tokens(["</think>"])
    llm.resize_token_embeddings(len(tokenizer))
    llm.generation_config.eos_token_id = [1, len(tokenizer) - 1]
    assert compose(llm, tokenizer).model.generation_config.eos_token_id == [1]
    assert "the LLM stops at '</think>' (311), where no answer ends: left out" in caplog.text


def test_gap_in_the_vocabulary_is_no_padding_at_its_end():
    """A token may have an ID beyond the number of tokens."""
    llm, tokenizer = make_llm()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 100
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    solo = compose(llm, tokenizer)
    assert vocabulary[last] > len(tokenizer)
    assert vocabulary[last] not in solo.model.generation_config.suppress_tokens
    assert vocabulary[last] < solo.model.config.text_config.vocab_size
    assert max(solo.model.config.vision_token_ids) < solo.model.config.text_config.vocab_size
    assert len(set(solo.model.config.vision_token_ids)) == 4
