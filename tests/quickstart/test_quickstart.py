"""The quickstart at 2% of its steps: metrics, report, progress output; the full run is marked slow."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tests.factories import locked_by_another_process

from solo_vlm.quickstart.run import STAGES, run_quickstart


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Run the quickstart as a process without a terminal: (output folder, stdout, lines of stderr, gaps)."""
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    command = [sys.executable, "-m", "solo_vlm", "quickstart", "--out", out, "--fraction", "0.02", "--json"]
    lines, times = [], [time.monotonic()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            for line in running.stderr:
                lines.append(line.rstrip())
                times.append(time.monotonic())
            stdout = running.stdout.read()
        except BaseException:
            running.kill()
            raise
    assert running.returncode == 0, lines
    times.append(time.monotonic())
    return out, stdout, lines, [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.fixture(scope="module")
def quickstart(process):
    return process[0], json.loads((process[0] / "metrics.json").read_text())


def test_progress_without_a_terminal_is_plain_lines_at_least_every_15_seconds(process):
    _, _, lines, gaps = process
    for stage in STAGES:
        first, *_, last = [line for line in lines if line.startswith(f"{stage}: ")]
        steps = first.split(" of ")[1]
        assert first == f"{stage}: step 0 of {steps}"
        assert re.fullmatch(rf"{stage}: step {steps} of {steps}, loss \d\.\d{{4}}, done in 0:\d\d:\d\d", last)
    assert not any("\x1b" in line for line in lines)
    assert max(gaps[1:]) < 15  # the first includes imports


def test_stdout_is_one_json_object(process):
    out, stdout, *_ = process
    assert json.loads(stdout) == json.loads((out / "metrics.json").read_text())


def test_metrics_have_scores_stages_and_sizes(quickstart):
    _, metrics = quickstart
    for score in ("digits_accuracy", "caption_exact_match", "qa_accuracy"):
        assert 0.0 <= metrics[score] <= 1.0
    assert metrics["seconds"] > 0
    assert metrics["tokens_per_second"] > 0
    assert list(metrics["stages"]) == list(STAGES)
    for stage in metrics["stages"].values():
        assert stage["tokens"] == stage["steps"] * 256
    assert metrics["stages"]["llm"]["loss_last"] < metrics["stages"]["llm"]["loss_first"]
    assert metrics["held_out"] == {"digits": 300, "captions": 200, "qa": 300}


def test_report_is_self_contained_and_shows_references(quickstart):
    out, _ = quickstart
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") > 60
    assert "http" not in html
    assert "reference:" in html
    assert Image.open(out / "loss.png").size == (1080, 420)


def test_repeated_quickstart_gives_the_same_metrics(quickstart):
    out, metrics = quickstart
    again = run_quickstart(out, fraction=0.02)
    for run in (again, metrics):
        for timed in (run, *run["stages"].values()):
            timed.pop("seconds")
            timed.pop("tokens_per_second", None)
    assert again == metrics


@pytest.mark.slow
@pytest.mark.timeout(2700)  # minutes at rest; a busy machine takes several times as long
def test_full_quickstart_reaches_its_scores(tmp_path):
    """Run the command on all cores."""
    command = [Path(sys.executable).with_name("solo"), "quickstart", "--out", tmp_path / "run", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["digits_accuracy"] >= 0.90
    assert metrics["caption_exact_match"] >= 0.80
    assert metrics["qa_accuracy"] >= 0.85


def test_second_quickstart_in_the_same_folder_is_rejected(run, tmp_path):
    (tmp_path / "quickstart.json").write_text("{}\n")
    (tmp_path / "data").mkdir()
    with locked_by_another_process(tmp_path):
        code, _, error = run("quickstart", "--out", tmp_path)
    assert code == 2
    assert error == f"solo: another run is writing to {tmp_path}: wait for it, or choose another folder\n"
    assert (tmp_path / "data").is_dir()
