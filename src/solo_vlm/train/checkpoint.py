"""Checkpoints of a run: sharded, written while training goes on, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from solo_vlm.errors import SoloError
from solo_vlm.train.optimizer import named_trainable
from solo_vlm.train.processes import Processes

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
        self._group = None if processes.mesh is None else dist.new_group(backend="gloo")
        self._writing: tuple[Future[Any], Path, Path] | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Save; one that is still being written is waited for."""
        self.finish()
        path = self._folder / f"step-{progress.step:08d}"
        if path.exists():
            return
        partial = self._folder / f"{_PARTIAL}{path.name}"
        if self._processes.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / _STATE).write_text(json.dumps(asdict(progress)))
        self._processes.wait()
        future: Any = async_save(
            _tensors(model, optimizer),
            checkpoint_id=partial,
            process_group=self._group,
            no_dist=self._group is None,
        )
        self._writing = (future, partial, path)
        if not self._asynchronous:
            self.finish()

    def advance(self) -> None:
        """Give a checkpoint its name if it has been written by now."""
        if self._writing and self._writing[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and give it its name.

        The first process's part ends last: it gathers what the others have written.
        """
        if self._writing is None:
            return
        future, partial, path = self._writing
        self._writing = None
        future.result()
        if self._processes.is_first:
            partial.rename(path)
            _sync(path.parent)
            for old in sorted(path.parent.glob("step-*"))[: -self._keep]:
                # Renamed first, so that a crash in the middle leaves no half of it under its name.
                shutil.rmtree(old.rename(old.with_name(f"{_PARTIAL}{old.name}")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    return max(folder.glob("step-*"), default=None)


def read_progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint."""
    return Progress(**json.loads((path / _STATE).read_text()))


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


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Everything that training changes, by name; the tensors share memory with the model's."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_trainable(model):
        tensors[f"model/{name}"] = parameter.detach()
        if optimizer is not None:
            for moment, tensor in optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{moment}"] = tensor
    return tensors


def _sync(folder: Path) -> None:
    """Make a change of names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
