"""A whole ablation, from an LLM and data of one's own to the report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest


def test_one_seed_is_refused(run, study):
    status, _, err = run("ablate", study / "study.yaml", "seeds=1")
    assert status == 2
    assert "seeds: Input should be greater than or equal to 2" in err


def test_a_dry_run_says_what_is_missing(run, study):
    status, out, err = run("ablate", study / "study.yaml", "--dry-run", "--json")
    assert status == 0, err
    plan = json.loads(out)
    assert plan["missing"] == {"runs": 10, "steps": 2 * (4 + 3 + 4 + 3 + 7)}
    assert plan["arms"]["no-stage1"]["changes"] == ["without stage1", "sft.steps = 7"]
    assert [len(stage["runs"]) for stage in plan["arms"]["base"]["stages"].values()] == [2, 2, 2]
    status, out, _ = run("ablate", study / "study.yaml", "--dry-run")
    assert "to be trained: 10 runs, 42 steps" in out


def test_the_package_lists_its_ablations(run):
    _, out, _ = run("ablate", "--list", "--json")
    listed = json.loads(out)
    assert {"no-stage1", "shuffled-labels", "fixed-square", "text-share"} < set(listed)
    assert "base" not in listed
    assert all(question.endswith("?") for question in listed.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_ablation_goes_on_where_it_was_stopped_and_ends_in_a_report(run, study):
    root = study / "root"
    command = [
        "ablate",
        str(study / "study.yaml"),
        "losses={names: data/heldout.parquet}",
        "--processes",
        "2",
    ]
    first = subprocess.Popen([sys.executable, "-m", "solo_vlm", *command], stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    line = next(line for line in first.stderr if line.startswith("stage1-") and ": done" in line)
    first.send_signal(signal.SIGTERM)
    first.stderr.read()
    assert first.wait() == 128 + signal.SIGTERM
    manifest = root / "runs" / line.split(":")[0] / "manifest.json"
    before = manifest.stat().st_mtime_ns

    status, out, err = run(*command, "--json")
    assert status == 0, err
    assert manifest.stat().st_mtime_ns == before
    report = json.loads(out)
    assert report["arms"]["no-stage1"]["steps"] == {"sft": 7}
    rows = pq.read_table(root / "study" / "results.parquet").to_pylist()
    assert len(rows) == 3 * 2 * 2
    assert len({row["value"] for row in rows if row["kind"] == "loss"}) == 6  # no arm or seed is another one
    assert {row["n"] for row in rows} == {7}
    for name in ("plot.png", "report.html", "report.json"):
        assert (root / "study" / name).is_file()

    for model in root.glob("runs/*/model"):
        shutil.rmtree(model)
    status, out, _ = run(*command, "--json")
    assert status == 0
    assert json.loads(out) == report
    assert not list(root.glob("runs/*/model"))
