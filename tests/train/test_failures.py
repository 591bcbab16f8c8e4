"""Joint exit of all processes after a failure, under torchrun, and stop signals."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
import yaml
from tests.factories import read_steps, run_settings

from solo_vlm.train.failures import Failure, Stopped, StopRequest, catch_signals, fail_together
from solo_vlm.utils.errors import SoloError

# `solo train` in which one process misbehaves on request.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from solo_vlm.cli import main
from solo_vlm.train import trainer

victim, how = int(sys.argv.pop(1)), sys.argv.pop(1)
optimizer_step = trainer.optimizer_step
taken = iter(range(3))
killed = Path(__file__).with_name("killed")

def take(*arguments):
    if next(taken, None) is None:
        if how == "kill once":
            if killed.exists():
                return optimizer_step(*arguments)
            killed.touch()
        if how.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(600)
        raise RuntimeError("the root cause")
    return optimizer_step(*arguments)

if int(os.environ["RANK"]) == victim:
    if how == "setting":
        sys.argv.append("optimizer.weight_decay=0.25")
    else:
        trainer.optimizer_step = take
main()
"""


@pytest.fixture
def torchrun(runs, tmp_path):
    """Return a function that starts torchrun on a small run; leftover processes are terminated."""
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start(victim, how, *options, **changes):
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump(run_settings(runs, tmp_path / "out", **{"steps": 300} | changes))
        )
        command = [
            *(sys.executable, "-m", "torch.distributed.run", *options),
            *(str(tmp_path / "script.py"), str(victim), how, "train", str(tmp_path / "recipe.yaml")),
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun forwards it


def wait_for_steps(process, out, count):
    while not (out / "metrics.jsonl").exists() or len(read_steps(out)) < count:
        assert process.poll() is None
        time.sleep(0.1)


def two_machines():
    """Return the options of two torchruns with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    return f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint {endpoint} --nproc-per-node 1".split()


def last_words(printed):
    """Return torchrun's final report of the root cause."""
    return printed.rpartition("Root Cause")[2]


def tracebacks(printed):
    """Count tracebacks of the run's processes, which are prefixed with their rank, without torchrun's own."""
    return printed.count("]: Traceback (most recent call last)")


@pytest.mark.distributed
def test_all_processes_exit_when_one_fails(torchrun):
    process = torchrun(1, "fail", "--standalone", "--nproc-per-node", "2")
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1
    assert tracebacks(printed) == 1
    assert "process 1 on" in last_words(printed)
    assert "RuntimeError: the root cause" in last_words(printed)


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_all_machines_exit_when_one_process_fails(torchrun, victim):
    options = two_machines()
    agents = [torchrun(victim, "fail", *options) for _ in range(2)]
    printed = [agent.communicate(timeout=150)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [1, 1]
    assert sum(map(tracebacks, printed)) == 1
    for output in printed:
        assert "RuntimeError: the root cause" in last_words(output)


@pytest.mark.distributed
def test_killed_process_is_reported_as_root_cause(torchrun):
    process = torchrun(1, "kill", "--standalone", "--nproc-per-node", "2")
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1
    assert tracebacks(printed) == 0
    assert "Signal 9 (SIGKILL)" in last_words(printed)


@pytest.mark.distributed
def test_process_that_hangs_ends_the_run_after_the_timeout_of_a_step(torchrun):
    options = "--standalone", "--nproc-per-node", "2"
    process = torchrun(1, "hang", *options, timeouts={"start": 300, "step": 10})
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Timed out waiting" in last_words(printed)


@pytest.mark.distributed
@pytest.mark.parametrize("agents", [1, 2])
def test_torchrun_restarts_a_killed_run_from_its_checkpoint(torchrun, tmp_path, agents):
    options = ["--standalone", "--nproc-per-node", "2"]
    if agents == 2:
        options = two_machines()
    options += ["--max-restarts", "1"]
    started = [torchrun(1, "kill once", *options, steps=8) for _ in range(agents)]
    printed = [agent.communicate(timeout=600)[1] for agent in started]
    assert [agent.returncode for agent in started] == [0] * agents, printed
    assert [line["step"] for line in read_steps(tmp_path / "out")] == list(range(1, 9))
    assert (tmp_path / "out" / "model").is_dir()


@pytest.mark.distributed
def test_failure_of_rank_0_ends_all_processes(torchrun, tmp_path):
    """Only rank 0 writes logs; here its tracker finds a file in place of its folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").write_text("not a folder")
    process = torchrun(-1, "", "--standalone", "--nproc-per-node", "2", trackers=["tensorboard"])
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1
    assert tracebacks(printed) == 0
    assert f"cannot access {tmp_path / 'out' / 'tensorboard'}: File exists" in printed


@pytest.mark.distributed
def test_process_with_other_settings_is_rejected(torchrun):
    process = torchrun(1, "setting", "--standalone", "--nproc-per-node", "2")
    _, printed = process.communicate(timeout=120)
    line = (
        "process 1 was started with other settings than process 0 (optimizer.weight_decay was 0.1, now 0.25)"
    )
    assert tracebacks(printed) == 0
    assert printed.count(f"solo: {line}") == 1
    assert line in last_words(printed)


@pytest.mark.distributed
def test_sigterm_to_torchrun_saves_with_loader_workers(torchrun, tmp_path, runs):
    data = {**run_settings(runs, tmp_path)["data"], "workers": 2}
    changes = {"checkpoint": {"save_interval": 1000}, "data": data}
    process = torchrun(-1, "", "--standalone", "--nproc-per-node", "2", **changes)
    wait_for_steps(process, tmp_path / "out", 3)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=120)
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert step == len(read_steps(tmp_path / "out"))
    assert printed.count(f"solo: stopped by SIGTERM, saved after step {step}") == 1


def test_closed_terminal_saves(runs, tmp_path):
    settings = run_settings(runs, tmp_path / "out", steps=10**5, checkpoint={"save_interval": 10**5})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    pid, terminal = pty.fork()
    if not pid:
        arguments = [sys.executable, "-m", "solo_vlm", "train", str(tmp_path / "run.yaml")]
        os.execve(sys.executable, arguments, {**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (tmp_path / "out/metrics.jsonl").exists() or len(read_steps(tmp_path / "out")) < 2:
            assert select.select([terminal], [], [], 60)[0]
            os.read(terminal, 10**5)
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert len(list((tmp_path / "out/checkpoints").iterdir())) == 1
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP


def test_sole_error_is_raised_unchanged():
    store = dist.HashStore()
    for error in (SoloError("the file is not there"), Stopped("stopped", 15)):
        with pytest.raises(type(error)) as caught, fail_together(store, 1, StopRequest()):
            raise error
        assert caught.value is error


def test_failure_message_is_one_line():
    assert Failure.from_exception(SoloError("no such file"), 3).message == "no such file"
    failure = Failure.from_exception(ValueError("bad"), 3)
    assert failure.message == f"process 3 on {socket.gethostname()}: ValueError: bad"
    assert failure.exit_code == 1


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)], ids=str
)
def test_only_first_signal_is_recorded(numbers):
    with catch_signals() as stop:
        send(*numbers)
        assert stop.signal == numbers[0]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_sigint_raises_immediately(first):
    with catch_signals(), pytest.raises(KeyboardInterrupt):
        send(first, signal.SIGINT)


def test_uninterrupted_body_ignores_repeated_signals():
    with catch_signals() as stop:
        with stop.uninterrupted():
            with stop.uninterrupted():
                send(signal.SIGINT)
            send(signal.SIGINT, signal.SIGINT, signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with catch_signals():
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) != before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
