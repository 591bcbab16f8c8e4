"""Commands that run side by side: processes of this machine, or tasks on a Ray cluster."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from solo_vlm.train.failures import Stopped, StopRequest, catch_signals
from solo_vlm.utils.errors import SoloError

Engine = Literal["local", "ray"]

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """A command, and the file that gets all it prints."""

    name: str
    command: list[str]
    log: Path

    def start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """The running process."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )

    def last_line(self) -> str:
        """What it printed last."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.is_file() else []
        return lines[-1] if lines else "nothing was printed"


def finish_jobs(
    jobs: Sequence[Job], processes: int, engine: Engine, on_wait: Callable[[], None] = lambda: None
) -> Iterator[Job]:
    """As `run_jobs`, for jobs that are meant to succeed: yield each one that does.

    Raises:
        SoloError: in the end, if some have failed; also as `run_jobs`.
        Stopped: by a signal.
    """
    failed = []
    for job, status in run_jobs(jobs, processes, engine, on_wait):
        if status:
            failed.append(f"{job.name} ({job.last_line()}; see {job.log})")
        else:
            yield job
    if failed:
        raise SoloError(
            f"{len(failed)} of {len(jobs)} jobs failed, the others are kept; the same command tries again: "
            + "; ".join(failed)
        )


def run_jobs(
    jobs: Sequence[Job], processes: int, engine: Engine, on_wait: Callable[[], None] = lambda: None
) -> Iterator[tuple[Job, int]]:
    """Run all, in their order as far as there is room; yield each with its exit code when it ends.

    Cores, and GPUs where there are any, are shared evenly. Under SIGINT or SIGTERM the processes are told to
    stop, and waited for.

    Args:
        jobs: what to run.
        processes: side by side. On Ray, each asks for one GPU where the cluster has any, else for one CPU.
        engine: `local`, or `ray`: one machine, or the cluster that the variable RAY_ADDRESS names, whose
            machines must all see the same files.
        on_wait: called several times a second while jobs run.

    Raises:
        SoloError: Ray is not installed.
        Stopped: by a signal.
    """
    return (_ray if engine == "ray" else _local)(jobs, processes, on_wait)


def _local(jobs: Sequence[Job], processes: int, on_wait: Callable[[], None]) -> Iterator[tuple[Job, int]]:
    shares = _shares(max(min(processes, len(jobs)), 1))
    free, waiting = deque(range(len(shares))), deque(jobs)
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    with catch_signals() as stop:
        try:
            while waiting or running:
                while waiting and free:
                    slot, job = free.popleft(), waiting.popleft()
                    running[slot] = job, job.start(shares[slot])
                time.sleep(_POLL_SECONDS)
                on_wait()
                _check(stop)
                ended = [slot for slot, (_, process) in running.items() if process.poll() is not None]
                for slot in ended:
                    job, process = running.pop(slot)
                    free.append(slot)
                    yield job, process.returncode
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()


def _check(stop: StopRequest) -> None:
    if stop.signal:
        raise Stopped("stopped: the same command goes on with the runs", stop.signal)


def _shares(processes: int) -> list[dict[str, str]]:
    """Environment of each process: its threads, and its GPU."""
    import torch

    gpus = torch.cuda.device_count()
    threads = {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // processes, 1))}
    return [
        threads | ({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {}) for slot in range(processes)
    ]


def _ray(jobs: Sequence[Job], processes: int, on_wait: Callable[[], None]) -> Iterator[tuple[Job, int]]:
    try:
        import ray
    except ImportError as error:
        raise SoloError("--engine ray needs Ray: pip install 'solo-vlm[ray]'") from error

    if not ray.is_initialized():
        ray.init(num_cpus=None if os.environ.get("RAY_ADDRESS") else processes, log_to_driver=False)
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0)

    @ray.remote(num_cpus=1, num_gpus=gpus)
    def work(job: Job) -> int:
        process = job.start({"OMP_NUM_THREADS": "1"})
        try:
            while process.poll() is None:  # not wait(), which a task that is cancelled does not leave
                time.sleep(_POLL_SECONDS)
            return process.returncode
        finally:
            process.terminate()
            process.wait()

    waiting = deque(jobs)
    running: dict[Any, Job] = {}
    with catch_signals() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    job = waiting.popleft()
                    running[work.remote(job)] = job
                ended, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                on_wait()
                _check(stop)
                for task in ended:
                    yield running.pop(task), ray.get(task)
        finally:
            for task in running:
                ray.cancel(task)
            if running:
                ray.wait(list(running), num_returns=len(running))
