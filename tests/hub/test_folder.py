"""Published folder: what it accepts, and its generation settings."""

from __future__ import annotations

import json

import pytest
from tests.factories import make_llm, make_solo
from transformers import GenerationConfig

from solo_vlm.hub.folder import check_publishable, write_folder
from solo_vlm.utils.errors import SoloError


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_published_folder_pads_left_and_stops_at_end_of_answer(tmp_path, has_generation_config):
    solo = make_solo()
    solo.save(tmp_path / "model")
    tokenizer_config = tmp_path / "model/tokenizer_config.json"
    tokenizer_config.write_text(
        json.dumps({**json.loads(tokenizer_config.read_text()), "padding_side": "right"})
    )
    generation_config = tmp_path / "model/generation_config.json"
    if has_generation_config:
        generation_config.write_text(json.dumps({"eos_token_id": 0, "suppress_tokens": [9]}))
    else:
        generation_config.unlink()
    (tmp_path / "published").mkdir()
    write_folder(tmp_path / "published", tmp_path / "model", "a card")
    settings = json.loads((tmp_path / "published/tokenizer_config.json").read_text())
    assert settings["padding_side"] == "left"
    generation = GenerationConfig.from_pretrained(tmp_path / "published")
    eos = solo.processor.tokenizer.eos_token_id
    assert generation.eos_token_id == ([0, eos] if has_generation_config else [eos])
    own = {9} if has_generation_config else set()
    assert set(generation.suppress_tokens) == own | set(solo.model.generation_config.suppress_tokens)
    assert json.loads(tokenizer_config.read_text())["padding_side"] == "right"  # unchanged


def test_other_folders_are_rejected(tmp_path):
    llm, _ = make_llm()
    llm.save_pretrained(tmp_path / "llm")
    cases = {
        "llm": "not a SOLO model",
        "nothing": "no model at",
        "adapter": "use the merged model",
        "release": "solo convert release",
    }
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "release").mkdir()
    (tmp_path / "release/config.json").write_text('{"architectures": ["SoloForCausalLM"]}')
    for folder, message in cases.items():
        with pytest.raises(SoloError, match=message):
            check_publishable(tmp_path / folder)
