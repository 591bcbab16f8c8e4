"""Launcher of many concurrent commands, such as training runs, as local processes or on a Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from solo_vlm.train.failures import Stopped, StopRequest, catch_signals
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import describe_recipe_changes
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import write_text

Executor = Literal["local", "ray"]

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """Command with the log file of its output."""

    name: str
    command: list[str]
    log: Path

    def start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the process, with `environment` on top of this process's variables."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )

    def last_line(self) -> str:
        """Return the last line of the log."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.is_file() else []
        return lines[-1] if lines else "no output"


@dataclass(frozen=True)
class TrainingRun:
    """One of many training runs below the same root.

    Attributes:
        name: Unique name below that root.
    """

    name: str
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Output directory of the run."""
        return self.recipe.output_dir

    @property
    def finished(self) -> bool:
        """Whether the run has completed all of its steps."""
        if not (self.folder / "model").is_dir():
            return False
        if changed := describe_recipe_changes(Recipe.load(self.folder / "recipe.yaml"), self.recipe):
            raise SoloError(
                f"{self.folder} was trained with another recipe ({changed}): remove it, or choose another "
                "root"
            )
        return True

    def job(self) -> Job:
        """Write the recipe to a file below the root and return the `solo train` job for it."""
        root = Path(self.recipe.root)
        recipe = root / "recipes" / f"{self.name}.yaml"
        write_text(recipe, yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False))
        command = [sys.executable, "-m", "solo_vlm", "train", str(recipe), "--json"]
        return Job(self.name, command, root / "logs" / f"{self.name}.log")


Run = TypeVar("Run", bound=TrainingRun)


def train_runs(
    runs: Sequence[Run], processes: int, executor: Executor, on_wait: Callable[[], None] = lambda: None
) -> Iterator[Run]:
    """Train all unfinished runs, the longest first, and yield each one as it finishes.

    Interrupted runs resume from their newest checkpoints. For the arguments see `run_jobs`.
    """
    # Longest runs first, so that only short ones are left at the end.
    runs = sorted(runs, key=lambda run: run.recipe.steps or 0, reverse=True)
    pending = {run.name: run for run in runs if not run.finished}
    for job in finish_jobs([run.job() for run in pending.values()], processes, executor, on_wait):
        yield pending[job.name]


def finish_jobs(
    jobs: Sequence[Job], processes: int, executor: Executor, on_wait: Callable[[], None] = lambda: None
) -> Iterator[Job]:
    """Run jobs like `run_jobs`, and yield each that succeeds; raise SoloError at the end if any failed."""
    failed = []
    for job, status in run_jobs(jobs, processes, executor, on_wait):
        if status:
            failed.append(f"{job.name} ({job.last_line()}; see {job.log})")
        else:
            yield job
    if failed:
        raise SoloError(
            f"{len(failed)} of {len(jobs)} jobs failed (the results of the others are kept; run the same "
            f"command to retry): {'; '.join(failed)}"
        )


def run_jobs(
    jobs: Sequence[Job], processes: int, executor: Executor, on_wait: Callable[[], None] = lambda: None
) -> Iterator[tuple[Job, int]]:
    """Run jobs in order, as slots become free, and yield each with its exit status as it ends.

    CPU cores and GPUs are divided evenly among the slots. On a stop signal, running processes are
    terminated and waited for.

    Args:
        processes: Maximum number of concurrent jobs. On Ray, each job requests one GPU if the cluster has
            any, else one CPU.
        executor: `local`, or `ray`: the cluster at RAY_ADDRESS, whose machines must share a file system, or
            a Ray instance on this machine if the variable is not set.
        on_wait: Called several times per second while jobs run.

    Raises:
        SoloError: Ray is not installed.
        Stopped: A signal arrived.
    """
    return (_run_on_ray if executor == "ray" else _run_locally)(jobs, processes, on_wait)


def _run_locally(
    jobs: Sequence[Job], processes: int, on_wait: Callable[[], None]
) -> Iterator[tuple[Job, int]]:
    environments = _slot_environments(max(min(processes, len(jobs)), 1))
    free, pending = deque(range(len(environments))), deque(jobs)
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    with catch_signals() as stop:
        try:
            while pending or running:
                while pending and free:
                    slot, job = free.popleft(), pending.popleft()
                    running[slot] = job, job.start(environments[slot])
                time.sleep(_POLL_SECONDS)
                on_wait()
                _raise_if_stopped(stop)
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


def _slot_environments(slots: int) -> list[dict[str, str]]:
    """Return the variables that give each slot its number of threads and its GPU."""
    import torch

    gpus = torch.cuda.device_count()
    threads = {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // slots, 1))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {}) for slot in range(slots)]


def _raise_if_stopped(stop: StopRequest) -> None:
    if stop.signal:
        raise Stopped("stopped: run the same command to resume", stop.signal)


def _run_on_ray(
    jobs: Sequence[Job], processes: int, on_wait: Callable[[], None]
) -> Iterator[tuple[Job, int]]:
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
            while process.poll() is None:  # a cancelled task would stay inside wait()
                time.sleep(_POLL_SECONDS)
            return process.returncode
        finally:
            process.terminate()
            process.wait()

    pending = deque(jobs)
    running: dict[Any, Job] = {}
    with catch_signals() as stop:
        try:
            while pending or running:
                while pending and len(running) < processes:
                    job = pending.popleft()
                    running[work.remote(job)] = job
                ended, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                on_wait()
                _raise_if_stopped(stop)
                for task in ended:
                    yield running.pop(task), ray.get(task)
        finally:
            for task in running:
                ray.cancel(task)
            if running:
                ray.wait(list(running), num_returns=len(running))
