"""Checkpoints of a run: sharded, written while training goes on, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from solo_vlm.train.optimizer import MOMENTS, named_trainable
from solo_vlm.train.parallel.processes import LONG, Processes
from solo_vlm.utils.errors import SoloError

_STATE = "training_state.json"
_PARTIAL = ".partial-"  # as in files.py, but one name that all processes know


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done, those included that were skipped.
        steps: of the whole run.
        tokens: seen.
        skipped_steps: for a loss or gradient that was not finite.
        data: state of the loaders, of all ranks as one.
    """

    step: int = 0
    steps: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    data: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints of a run, as folders `step-NNNNNNNN` of torch's distributed checkpoints.

    They hold the trainable parameters, the optimizer's moments, and `training_state.json`. Chance needs no
    state: it is drawn anew for each step from the recipe's seed. Any number of processes reads what any other
    number has written.

    Args:
        folder: for them.
        keep: how many of the newest stay.
        asynchronous: whether `save` returns before the files are written.
        processes: of the run.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool, processes: Processes) -> None:
        self._folder = folder
        self._keep = keep
        self._asynchronous = asynchronous
        self._processes = processes
        # A group of its own: another thread talks there.
        self._group = None if processes.mesh is None else dist.new_group(backend="gloo", timeout=LONG)
        self._namer = ThreadPoolExecutor(1, "checkpoint-namer")
        self._writing: Future[Any] | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Save, unless this step is saved already; one that is still being written is waited for.

        Raises:
            RuntimeError: the model does not hold the parameters that the optimizer changes.
        """
        self.finish()
        tensors = _tensors(model, optimizer)
        path = self._folder / f"step-{progress.step:08d}"
        partial = self._folder / f"{_PARTIAL}{path.name}"
        # Asked by one process for all: on a network file system, each may see another state of a folder.
        if not self._processes.decide(lambda: _prepare(path, partial, progress)):
            return
        future: Any = async_save(
            tensors,
            checkpoint_id=partial,
            process_group=self._group,
            no_dist=self._group is None,
        )
        # The first process's part ends last: it gathers what the others have written.
        is_first = self._processes.is_first
        self._writing = self._namer.submit(self._name, future, partial, path) if is_first else future
        if not self._asynchronous:
            self.finish()

    def check(self) -> None:
        """Raise what went wrong with a checkpoint since it was saved."""
        if self._writing and self._writing.done():
            self.finish()

    def finish(self, timeout: float | None = None) -> None:
        """Wait for this process's part of the checkpoint that is being written; the first one's names it.

        Args:
            timeout: seconds; default: as long as it takes.

        Raises:
            TimeoutError: it is not written by then.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result(timeout)

    def _name(self, written: Future[Any], partial: Path, path: Path) -> None:
        """Give a checkpoint its name when it is written, also while the training loop waits for others."""
        written.result()
        partial.rename(path)
        _sync(path.parent)
        for old in sorted(path.parent.glob("step-*"))[: -self._keep]:
            # Renamed first, so that a crash in the middle leaves no half of it under its name.
            shutil.rmtree(old.rename(old.with_name(f"{_PARTIAL}{old.name}")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    return max(folder.glob("step-*"), default=None)


def read_progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint.

    Raises:
        SoloError: what says so is missing or damaged.
    """
    try:
        return Progress(**json.loads((path / _STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SoloError(f"cannot go on from {path}: {_STATE} is not readable: {error}") from error


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give the trainable parameters, and the optimizer's moments, their values from a checkpoint.

    Raises:
        SoloError: the checkpoint is not readable, or belongs to another model.
    """
    tensors = _tensors(model, optimizer)
    try:
        load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise SoloError(f"cannot go on from {path}: {reason}") from error


def _prepare(path: Path, partial: Path, progress: Progress) -> bool:
    """Make the folder to write into, unless the checkpoint is there already; return whether to write."""
    if path.exists():
        return False
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / _STATE).write_text(json.dumps(asdict(progress)))
    return True


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Everything that training changes, by name; the tensors share memory with the model's.

    Raises:
        RuntimeError: the optimizer holds other parameters than the model, as it does while FSDP has gathered
            them.
    """
    parameters = dict(named_trainable(model))
    tensors = {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer is None:
        return tensors
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if strange := [name for name, parameter in parameters.items() if parameter not in held]:
        raise RuntimeError(f"not saved or loaded: the optimizer does not hold the model's {strange[0]}")
    if len(held) > len(parameters):
        raise RuntimeError(
            f"not saved or loaded: {len(held) - len(parameters)} parameters are not the model's"
        )
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            tensors[f"optimizer/{name}/{moment}"] = optimizer.state[parameter][moment]
    return tensors


def _sync(folder: Path) -> None:
    """Make a change of names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
