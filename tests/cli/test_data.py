"""`solo data`: commands of the catalog, with their output and errors."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.catalog.catalog_rows import USUAL


def test_list_shows_every_data_set_with_the_papers_count(run_data):
    code, out, _ = run_data("list")
    assert code == 0
    for name in USUAL:
        assert f" {name} " in out
    assert "23,681,864 images" in out
    assert "253,309 sequences" in out


def test_list_as_json(run_data):
    _, out, error = run_data("list", "--json")
    entries = {entry["name"]: entry for entry in json.loads(out)["data_sets"]}
    assert error == ""
    assert len(entries) == 45 + 10  # of the paper, and of the recipes solo-open/
    assert entries["capfusion"]["stages"][0]["vision_tokens"] == 5_491_625_358
    assert entries["tallyqa"]["samples"] == 100_000
    assert entries["detailed-captions"]["schema_confirmed"] is False


def test_convert(run_data, tmp_path):
    (tmp_path / "raw").mkdir()
    row = USUAL["vqav2"][0]
    pq.write_table(pa.Table.from_pylist([row, {**row, "texts": []}]), tmp_path / "raw" / "x.parquet")
    arguments = ["convert", "vqav2", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1]
    code, out, error = run_data(*arguments)
    assert code == 0
    assert "1 samples with 1 images" in out.replace("\n", "")
    assert "1 rejected:" in out
    assert error == ""
    code, out, _ = run_data(*arguments, "--json")
    assert code == 0
    assert json.loads(out)["rejected"] == {"no-answer": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "vqa", "--raw", ".", "--out", "o"], "did you mean dvqa"),
        (["convert", "vqav2", "--raw", "nowhere", "--out", "o"], "nowhere does not exist"),
        (["download", "vqav2", "--urls", ".", "--out", "o"], "not a list of URLs"),
    ],
)
def test_user_error_is_one_line_with_exit_code_2(run_data, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = run_data(*arguments)
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith("solo: ")
    assert message in line
    assert not list(tmp_path.iterdir())
