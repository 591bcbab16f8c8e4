"""`solo convert`: output and errors."""

from __future__ import annotations

import json

import pytest
from tests.convert.original_files import (
    LOCATIONS,
    TEXT_TOKENS,
    VISION,
    original_settings,
    original_weights,
    write_megatron,
    write_original,
    write_sentencepiece,
)

ROWS = TEXT_TOKENS + len(VISION + LOCATIONS)
SETTINGS = original_settings(ROWS, num_hidden_layers=2)


@pytest.fixture
def original(tmp_path):
    write_original(tmp_path / "original", original_weights(SETTINGS), SETTINGS)
    write_sentencepiece(tmp_path / "original", VISION + LOCATIONS)
    return tmp_path / "original"


def test_original_folder_and_back(run, original, tmp_path, picture):
    code, out, _ = run("convert", "release", original, tmp_path / "solo", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["vocabulary"] == facts["tokens"] == ROWS
    assert facts["layout"] == "original"
    assert facts["vision_token_ids"] == [TEXT_TOKENS + 1, TEXT_TOKENS, TEXT_TOKENS + 2, TEXT_TOKENS + 4]
    code, out, _ = run("convert", "to-release", tmp_path / "solo", tmp_path / "back", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == facts["bytes"]
    code, out, _ = run("convert", "release", tmp_path / "back", tmp_path / "again")
    assert code == 0
    assert "solo generate --model" in out


def test_megatron_checkpoint(run, original, tmp_path):
    source = write_megatron(tmp_path / "megatron", original_weights(SETTINGS), SETTINGS, 2, 2, 2048)
    code, out, _ = run("convert", "megatron", source, tmp_path / "solo", "--tokenizer", original, "--json")
    assert code == 0
    assert json.loads(out)["vocabulary"] == ROWS
    assert json.loads(out)["layout"] == "paper"


def test_generate_from_the_original_folder(run, original, tmp_path, picture):
    picture(64, 32).save(tmp_path / "photo.png")
    arguments = ["--image", tmp_path / "photo.png", "--prompt", "what is this?", "--max-new-tokens", 3]
    code, out, error = run("generate", "--model", original, *arguments, "--json")
    assert code == 0, error
    assert json.loads(out)["num_patches"] == 2
    run("convert", "release", original, tmp_path / "solo")
    _, converted, _ = run("generate", "--model", tmp_path / "solo", *arguments, "--json")
    assert json.loads(converted)["answer"] == json.loads(out)["answer"]


def test_errors_are_one_line_and_leave_no_files(run, original, tmp_path):
    file = original / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    code, out, error = run("convert", "release", original, tmp_path / "new" / "solo", "--json")
    assert (code, out) == (2, "")
    assert error.startswith("solo: ") and error.count("\n") == 1
    assert str(file) in error and "truncated" in error
    assert not list((tmp_path / "new").glob("**/*"))
    for verb in ("release", "megatron", "to-release"):
        code, _, error = run("convert", verb, tmp_path / "nowhere", tmp_path / "solo")
        assert code == 2
        assert error.startswith("solo: ") and "nowhere" in error
