"""Concurrent jobs: exit statuses, failures and signals, locally and on Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from solo_vlm.experiments.launcher import Job, finish_jobs, run_jobs
from solo_vlm.utils.errors import SoloError


def job(folder, name, code):
    return Job(name, [sys.executable, "-c", code], folder / f"{name}.log")


def test_jobs_run_concurrently_and_report_exit_status(tmp_path):
    """The first two jobs wait for each other to start."""
    meet = (
        "import pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / '{0}').touch()\n"
        "while not (folder / '{1}').exists(): time.sleep(0.01)\n"
    )
    jobs = [
        job(tmp_path, "first", meet.format("a", "b")),
        job(tmp_path, "second", meet.format("b", "a")),
        job(tmp_path, "third", "import sys; print('no luck'); sys.exit(3)"),
    ]
    ended = {ran.name: status for ran, status in run_jobs(jobs, 2, "local")}
    assert ended == {"first": 0, "second": 0, "third": 3}
    assert jobs[2].last_line() == "no luck"
    assert list(run_jobs([], 2, "local")) == []


def test_failed_jobs_are_reported_after_the_others_finish(tmp_path):
    jobs = [
        job(tmp_path, "bad", "import sys; print('no luck'); sys.exit(3)"),
        job(tmp_path, "good", "import time; time.sleep(0.5)"),
    ]
    looks, finished = [], finish_jobs(jobs, 2, "local", on_wait=lambda: looks.append(1))
    assert next(finished).name == "good"
    assert looks
    with pytest.raises(SoloError, match=r"1 of 2 jobs failed.* bad \(no luck; see .*bad.log\)"):
        next(finished)


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_sigterm_terminates_the_jobs(tmp_path, executor):
    """The launcher leaves no process behind."""
    if executor == "ray":
        pytest.importorskip("ray")
    code = (
        "import sys, pathlib\n"
        "from solo_vlm.experiments.launcher import Job, run_jobs\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        'code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"\n'
        "list(run_jobs([Job('one', [sys.executable, '-c', code], folder / 'log')], 1, sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), executor], stderr=subprocess.PIPE)
    log = tmp_path / "log"
    while not (log.is_file() and log.read_text().strip()):
        time.sleep(0.05)
    child = int(log.read_text())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "run the same command to resume" in err.decode()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_ray_reports_exit_status(tmp_path):
    pytest.importorskip("ray")
    jobs = [job(tmp_path, "good", "print(1)"), job(tmp_path, "bad", "import sys; sys.exit(4)")]
    assert {ran.name: status for ran, status in run_jobs(jobs, 2, "ray")} == {"good": 0, "bad": 4}


def test_missing_ray_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SoloError, match=r"solo-vlm\[ray\]"):
        list(run_jobs([job(tmp_path, "any", "")], 1, "ray"))
