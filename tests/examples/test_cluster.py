"""Launch files for clusters, with stubs in place of their schedulers."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.factories import (
    ROOT,
    image_rows,
    make_solo,
    read_steps,
    run_settings,
    text_rows,
    write_training_data,
)

CLUSTER = ROOT / "examples" / "cluster"

# A scheduler of two machines that are this one. A requeued job starts again once its script has ended.
SBATCH = """
export SLURM_CPUS_PER_TASK=96
export SLURM_JOB_ID=7 SLURM_NNODES=2 SLURM_GPUS_ON_NODE=1 SLURM_JOB_NODELIST=two SLURM_RESTART_COUNT=0
while :; do
    rm -f requeued
    bash "$@" & echo $! > pid
    wait $!; status=$?
    [ -e requeued ] || exit $status
    SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""
SCONTROL = 'case "$1" in show) echo 127.0.0.1 ;; requeue) echo "$2" > requeued ;; esac'
SRUN = """
echo "$1" >> srun-option; shift
"$@" & first=$!
"$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first $second; wait $first; status=$?; wait $second || status=$?
exit $status
"""


def stub(folder: Path, **programs: str) -> dict[str, str]:
    """Return an environment whose PATH finds these shell scripts first."""
    (folder / "bin").mkdir()
    for name, script in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PORT": port, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


TORCHRUN = f'exec {sys.executable} -m torch.distributed.run "$@"'


def submit(folder, steps):
    """Start a Slurm job of a run in a folder."""
    write_training_data(folder, image_rows(24), text_rows(64))
    make_solo().save(folder / "llama")
    plain = run_settings(folder, folder / "out", steps=steps, checkpoint={"save_interval": 1000})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain))
    environment = stub(folder, sbatch=SBATCH, scontrol=SCONTROL, srun=SRUN, torchrun=TORCHRUN)
    command = ["sbatch", str(CLUSTER / "slurm.sh"), "recipe.yaml"]
    return subprocess.Popen(command, cwd=folder, env=environment)


@pytest.mark.distributed
def test_requeued_slurm_job_resumes_by_itself(tmp_path):
    job = submit(tmp_path, steps=60)
    try:
        metrics = tmp_path / "out" / "metrics.jsonl"
        while not metrics.exists() or len(read_steps(tmp_path / "out")) < 3:
            assert job.poll() is None
            time.sleep(0.1)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)  # as --signal=B:TERM@600
        assert job.wait(600) == 0
    finally:
        job.terminate()
    assert set((tmp_path / "srun-option").read_text().split()) == {"--cpus-per-task=96"}
    assert [line["step"] for line in read_steps(tmp_path / "out")] == list(range(1, 61))
    assert (tmp_path / "out" / "model").is_dir()
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["7-0", "7-1"]
    assert len(list((tmp_path / "logs" / "7-1").rglob("stderr.log"))) == 2  # one per process
    stopped = [
        log
        for log in (tmp_path / "logs" / "7-0").rglob("stderr.log")
        if "saved after step" in log.read_text()
    ]
    assert len(stopped) == 1


@pytest.mark.distributed
def test_slurm_job_told_to_stop_while_it_exports_ends_with_its_model(tmp_path):
    """torchrun fails after a signal, also where its processes do not: queued again, the job finds it done."""
    job = submit(tmp_path, steps=3)
    try:
        while not (tmp_path / "out" / "manifest.json").exists():  # written just before the model
            assert job.poll() is None
            time.sleep(0.01)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        assert job.wait(600) == 0
    finally:
        job.terminate()
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert [line["step"] for line in read_steps(tmp_path / "out")] == [1, 2, 3]


def test_slurm_job_that_finishes_after_a_signal_is_not_requeued(tmp_path):
    finishes = "trap '' TERM; touch started; sleep 1"
    environment = stub(tmp_path, sbatch=SBATCH, scontrol=SCONTROL, srun=finishes)
    job = subprocess.Popen(
        ["sbatch", str(CLUSTER / "slurm.sh"), "recipe.yaml"], cwd=tmp_path, env=environment
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert job.wait(60) == 0


def command_of(name: str) -> str:
    """Return the shell command of a launch file."""
    documents = list(yaml.safe_load_all((CLUSTER / name).read_text()))
    if name == "skypilot.yaml":
        return documents[0]["run"]
    (container,) = documents[1]["spec"]["template"]["spec"]["containers"]
    return container["args"][0]


@pytest.mark.parametrize("name", ["skypilot.yaml", "kubernetes.yaml"])
def test_command_is_one_that_torchrun_understands(tmp_path, name):
    check = "from torch.distributed.run import parse_args, config_from_args; import sys\n"
    check += "found = parse_args(sys.argv[1:]); config_from_args(found)\n"
    check += "print(found.nnodes, found.rdzv_endpoint, found.training_script, *found.training_script_args)"
    (tmp_path / "check.py").write_text(check)
    environment = stub(tmp_path, torchrun=f'exec {sys.executable} {tmp_path / "check.py"} "$@"')
    environment |= {
        "RECIPE": "solo-7b/stage1 steps=10",
        "CHECKPOINTS": "s3://bucket/run",
        "SKYPILOT_NUM_NODES": "4",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "solo-0.solo\n10.0.0.2",
        "SKYPILOT_TASK_ID": "task",
    }
    printed = subprocess.run(
        ["bash", "-ec", command_of(name)], env=environment, capture_output=True, text=True, check=True
    )
    expected = "4 solo-0.solo:29500 solo_vlm train solo-7b/stage1 steps=10 root=/runs"
    if name == "skypilot.yaml":
        expected += " checkpoint.folder=s3://bucket/run"
    assert printed.stdout.splitlines()[-1] == expected
