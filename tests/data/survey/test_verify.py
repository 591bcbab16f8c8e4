"""Verification of data: unusable rows with location and reason, and exit codes."""

from __future__ import annotations

import json
from collections import Counter

import pytest


def test_valid_data_passes(made, run_data):
    code, out, error = run_data("verify", made.file, "--json")
    assert (code, error) == (0, "")
    facts = json.loads(out)
    assert (facts["passed"], facts["rows"], facts["rejected"]) == (True, 150, 0)
    assert [source["samples"] for source in facts["sources"]] == [120, 30]
    assert [source["images"] for source in facts["sources"]] == [120, 0]


@pytest.mark.parametrize(("verb", "total"), [("verify", ("rows", 60)), ("stats", ("total", 60))])
def test_source_listed_twice_counts_twice(made, run_data, verb, total):
    again = "data.sources=[{path: texts.jsonl}, {path: texts.jsonl}]"
    facts = json.loads(run_data(verb, made.file, again, "--json")[1])
    assert [source["source"] for source in facts["sources"]] == ["texts.jsonl", "texts.jsonl (2)"]
    assert [source["samples"] for source in facts["sources"]] == [30, 30]
    name, count = total
    assert (facts[name] if name == "rows" else facts[name]["samples"]) == count


def test_unusable_rows_are_counted_and_located(broken, run_data, tmp_path):
    report = tmp_path / "report.jsonl"
    code, out, _ = run_data("verify", broken, "--json", "--report", report)
    facts = json.loads(out)
    assert code == 1
    assert (facts["passed"], facts["rows"], facts["rejected"]) == (False, 36, 5)
    bad, texts = facts["sources"]
    assert bad["rejected"] == {"schema": 2, "image": 1, "too-long": 1, "image-count": 1}
    assert texts["rejected"] == {}
    (image,) = bad["examples"]["image"]
    assert image.startswith(f"{tmp_path}/bad.parquet, row group 0, row 1: image: ")
    assert len(bad["examples"]["schema"]) == 2

    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == bad["rejected"]
    assert [line["where"].rpartition(", row group ")[2] for line in lines] == [
        *("0, row 1", "0, row 2", "0, row 3", "1, row 0", "1, row 1")
    ]
    assert not list(tmp_path.glob(".partial-*"))


def test_max_skipped_sets_the_exit_code(broken, run_data):
    share = 5 / 36
    assert run_data("verify", broken, f"data.max_skipped={share + 1e-6}")[0] == 0
    code, out, error = run_data("verify", broken, f"data.max_skipped={share - 1e-6}")
    assert (code, error) == (1, "")
    assert "2 schema, such as" in out
    assert "5 of 36 rows cannot be used: MORE than data.max_skipped" in out


def test_truncated_file_is_detected(made, run_data, tmp_path):
    """The footer of a parquet file is at its end, so damage in the middle only shows on reading."""
    data = bytearray((made.folder / "captions.parquet").read_bytes())
    data[1000:3000] = bytes(2000)
    (tmp_path / "x.parquet").write_bytes(data)
    code, out, _ = run_data("verify", made.file, f"data.sources=[{{path: {tmp_path}/x.parquet}}]", "--json")
    assert code == 1
    assert json.loads(out)["sources"][0]["rejected"]["broken-shard"] >= 1


def test_bad_text_and_deep_nesting_are_reported_per_row(made, run_data, tmp_path):
    good = json.dumps({"id": float("nan"), "messages": [{"role": "assistant", "content": "red"}]})
    surrogate = json.dumps({"messages": [{"role": "assistant", "content": "cut \ud83d"}]})
    missing = json.dumps({"messages": [{"role": "assistant", "content": "red"}], "image": "\udce9.png"})
    deep = '{"messages": ' + "[" * 3000 + "]" * 3000 + "}"
    (tmp_path / "x.jsonl").write_text("\n".join([good, surrogate, deep, missing, good]))
    report = tmp_path / "report.jsonl"
    source = f"data.sources=[{{path: {tmp_path}/x.jsonl}}]"
    for options in (["--json"], []):
        code, out, error = run_data("verify", made.file, source, "--report", report, *options)
        assert (code, error) == (1, "")
        if options:
            facts = json.loads(out)
            assert facts["sources"][0]["samples"] == 2
            assert facts["sources"][0]["rejected"].keys() == {"schema", "json", "image"}
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["where"].rpartition(", ")[2] for line in lines] == ["row 1", "row 2", "row 3"]
    assert "\\ud83d" in lines[0]["error"]


def test_source_of_blank_lines_is_rejected_like_an_empty_one(made, run_data, tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    sources = f"data.sources=[{{path: {tmp_path / 'blank.jsonl'}}}]"
    code, _, error = run_data("verify", made.file, sources)
    assert code == 2
    assert "blank.jsonl has no rows" in error
