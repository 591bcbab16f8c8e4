"""Exported folders from which plain transformers generates rightly, whatever the run started from."""

from __future__ import annotations

import json

import pytest
from tests.factories import (
    ProcessGroup,
    image_rows,
    make_solo,
    run_recipe,
    run_settings,
    text_rows,
    write_training_data,
)
from transformers import GenerationConfig

from solo_vlm.train import Recipe, train
from solo_vlm.train.checkpoint import export_checkpoint


def forget(folder):
    """Make a folder like one of an older version: padding on the right, and no ends of answers."""
    for name, changes in (
        ("tokenizer_config.json", {"padding_side": "right"}),
        ("generation_config.json", {"eos_token_id": None}),
    ):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}])
def test_sharded_runs_export_the_generation_config_of_the_model_they_started_from(tmp_path, changes):
    write_training_data(tmp_path, image_rows(16), text_rows(40))
    solo = make_solo()
    solo.model.generation_config.eos_token_id = [7, solo.processor.tokenizer.eos_token_id]
    solo.save(tmp_path / "llama")
    plain = run_settings(tmp_path, tmp_path / "out", steps=2, **changes)
    assert ProcessGroup(2, run_recipe, plain).wait() == [0, 0]
    expected, actual = (
        GenerationConfig.from_pretrained(tmp_path / name).to_dict() for name in ("llama", "out/model")
    )
    assert expected["suppress_tokens"]
    assert actual == expected


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}])
def test_exports_pad_on_the_left_and_know_where_answers_end(tmp_path, changes):
    write_training_data(tmp_path, image_rows(16), text_rows(40))
    solo = make_solo()
    solo.save(tmp_path / "llama")
    forget(tmp_path / "llama")
    train(Recipe.parse(run_settings(tmp_path, tmp_path / "out", steps=3, **changes)))
    export_checkpoint(tmp_path / "out", tmp_path / "exported")
    for folder in (tmp_path / "out/model", tmp_path / "exported"):
        assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "left"
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
        assert ends == [solo.processor.tokenizer.eos_token_id]
