"""`solo convert`: what it prints, and how it fails."""

from __future__ import annotations

import json

import pytest
from tests.convert.original_files import (
    LOCATIONS,
    TEXT_TOKENS,
    VISION,
    release_settings,
    release_weights,
    write_megatron,
    write_release,
    write_sentencepiece,
)

ROWS = TEXT_TOKENS + len(VISION + LOCATIONS)
SETTINGS = release_settings(ROWS, num_hidden_layers=2)


@pytest.fixture
def release(tmp_path):
    write_release(tmp_path / "release", release_weights(SETTINGS), SETTINGS)
    write_sentencepiece(tmp_path / "release", VISION + LOCATIONS)
    return tmp_path / "release"


def test_release_and_back(run, release, tmp_path, picture):
    code, out, _ = run("convert", "release", release, tmp_path / "solo", "--json")
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


def test_megatron(run, release, tmp_path):
    source = write_megatron(tmp_path / "megatron", release_weights(SETTINGS), SETTINGS, 2, 2, 2048)
    code, out, _ = run("convert", "megatron", source, tmp_path / "solo", "--tokenizer", release, "--json")
    assert code == 0
    assert json.loads(out)["vocabulary"] == ROWS
    assert json.loads(out)["layout"] == "paper"


def test_generate_with_the_original_folder(run, release, tmp_path, picture):
    picture(64, 32).save(tmp_path / "photo.png")
    arguments = ["--image", tmp_path / "photo.png", "--prompt", "what is this?", "--max-new-tokens", 3]
    code, out, error = run("generate", "--model", release, *arguments, "--json")
    assert code == 0, error
    assert json.loads(out)["num_patches"] == 2
    run("convert", "release", release, tmp_path / "solo")
    _, converted, _ = run("generate", "--model", tmp_path / "solo", *arguments, "--json")
    assert json.loads(converted)["answer"] == json.loads(out)["answer"]


def test_errors_are_one_line_and_leave_nothing(run, release, tmp_path):
    file = release / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    code, out, error = run("convert", "release", release, tmp_path / "new" / "solo", "--json")
    assert (code, out) == (2, "")
    assert error.startswith("solo: ") and error.count("\n") == 1
    assert str(file) in error and "truncated" in error
    assert not list((tmp_path / "new").glob("**/*"))
    for verb in ("release", "megatron", "to-release"):
        code, _, error = run("convert", verb, tmp_path / "nowhere", tmp_path / "solo")
        assert code == 2
        assert error.startswith("solo: ") and "nowhere" in error
