"""`solo check`: table, JSON and exit code."""

from __future__ import annotations

import json

import pytest
from tests.factories import make_llm, make_solo


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    """Return the folder of the LLM that `solo_folder` was made of."""
    folder = tmp_path_factory.mktemp("models") / "llm"
    for part in make_llm("qwen3"):
        part.save_pretrained(folder)
    return folder


def test_table_names_every_property(run, solo_folder):
    code, out, _ = run("check", solo_folder)
    assert code == 0
    assert "SOLO model (qwen3)" in out
    assert "no future token is visible" in out
    assert "every property that applies holds" in out


def test_text_logits_are_compared_with_the_llm(run, solo_folder, llm_folder):
    code, out, _ = run("check", solo_folder, "--llm", llm_folder, "--json")
    found = json.loads(out)
    assert (code, found["passed"], found["properties"]["text_logits"]["status"]) == (0, True, "holds")


def test_plain_llm_has_no_patches(run, llm_folder):
    code, out, _ = run("check", llm_folder, "--json", "--no-save")
    found = json.loads(out)
    assert (code, found["kind"]) == (0, "LLM (qwen3)")
    skipped = {name for name, each in found["properties"].items() if each["status"] == "skipped"}
    assert skipped == {"text_logits", "template", "patches", "saving"}


def test_failed_property_ends_with_exit_code_1(run, tmp_path):
    solo = make_solo()
    solo.save(tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "right"}))
    code, out, _ = run("check", tmp_path / "model")
    assert code == 1
    assert "1 property FAILS" in out
    assert "NO: batch equals single: prompt 1 of 2" in out
    assert "padded on the right" in out


def test_missing_folder_is_one_line(run, tmp_path):
    code, _, err = run("check", tmp_path / "nothing")
    assert (code, err.count("\n")) == (2, 1)
