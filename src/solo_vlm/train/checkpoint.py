"""Sharded, asynchronous checkpoints of a run, and export to a model folder for transformers."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from transformers import PreTrainedModel

from solo_vlm.models.load import save_model
from solo_vlm.train.model import (
    adapter_state_dict,
    has_adapters,
    load_base_model,
    merge_adapter,
    set_trainable,
)
from solo_vlm.train.optimizer import MOMENTS, named_trainable
from solo_vlm.train.parallel.context import LONG_TIMEOUT, DistributedContext
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_folder

_STATE_FILE = "training_state.json"
_PARTIAL_PREFIX = ".partial-"  # as in utils/files.py, but with a name that all processes know


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: Optimizer steps done, including skipped ones.
        total_steps: Optimizer steps of the whole run.
        tokens: Tokens processed, including padding.
        skipped_steps: Steps skipped for a non-finite loss or gradient.
        data: Merged state of the data loaders of all ranks.
    """

    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    data: dict[str, Any] | None = None


class Checkpointer:
    """Writer of checkpoints, as folders `step-NNNNNNNN` in torch's distributed format.

    They hold the trainable parameters, the optimizer's moments and `training_state.json`. No RNG state is
    needed, because each step reseeds. Any number of processes can load them.

    Args:
        keep: Number of newest checkpoints to keep.
        asynchronous: Whether `save` returns before the files are written.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool, context: DistributedContext) -> None:
        self._folder = folder
        self._keep = keep
        self._asynchronous = asynchronous
        self._context = context
        # A separate group, because a background thread communicates.
        self._group = None if context.mesh is None else dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        self._finalizer = ThreadPoolExecutor(1, "checkpoint-finalizer")
        self._pending: Future[Any] | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Save the current step unless it is saved already; wait for a pending checkpoint first."""
        self.wait()
        tensors = _trained_tensors(model, optimizer)
        path = self._folder / f"step-{state.step:08d}"
        partial = self._folder / f"{_PARTIAL_PREFIX}{path.name}"
        # Checked in rank 0: on a network file system, processes may see different states of a folder.
        if not self._context.broadcast_from_rank0(lambda: _create_partial(path, partial, state)):
            return
        future: Any = async_save(
            tensors, checkpoint_id=partial, process_group=self._group, no_dist=self._group is None
        )
        # Rank 0 finishes last, because it collects the metadata of all ranks.
        is_main = self._context.is_main_process
        self._pending = self._finalizer.submit(self._finalize, future, partial, path) if is_main else future
        if not self._asynchronous:
            self.wait()

    def raise_errors(self) -> None:
        """Raise the error of a background save that has failed."""
        if self._pending and self._pending.done():
            self.wait()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until this process's part of a pending checkpoint is written; in rank 0, until it is complete.

        Raises TimeoutError after `timeout` seconds; None waits indefinitely.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result(timeout)

    def _finalize(self, written: Future[Any], partial: Path, path: Path) -> None:
        """Rename a complete checkpoint and delete old ones, in the background."""
        written.result()
        partial.rename(path)
        _sync_folder(path.parent)
        for old in sorted(path.parent.glob("step-*"))[: -self._keep]:
            # Renamed first, so that a crash does not leave half a checkpoint under a valid name.
            shutil.rmtree(old.rename(old.with_name(f"{_PARTIAL_PREFIX}{old.name}")))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, if any."""
    return max(folder.glob("step-*"), default=None)


def load_train_state(path: Path) -> TrainState:
    """Read the progress of the run from a checkpoint."""
    try:
        return TrainState(**json.loads((path / _STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SoloError(f"cannot resume from {path}: {_STATE_FILE} is not readable: {error}") from error


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load the trainable parameters, and the optimizer's moments, in place."""
    tensors = _trained_tensors(model, optimizer)
    try:
        load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise SoloError(f"cannot resume from {path}: {reason}") from error


def export_model(
    out: Path, model: PreTrainedModel, processor: Any, recipe: Recipe, context: DistributedContext
) -> Path:
    """Save the trained model as `out/model` for `from_pretrained`, adapters also as `out/adapter`.

    A collective call; rank 0 writes. Adapters are merged into the base model. Returns the path of the model.
    """
    path = out / "model"
    if has_adapters(model):
        weights = adapter_state_dict(model)
        if context.is_main_process:
            # Left by an export that was killed before it wrote the model.
            shutil.rmtree(out / "adapter", ignore_errors=True)
            with new_folder(out / "adapter") as folder:
                model.save_pretrained(folder, state_dict=weights)
            merged = merge_adapter(load_base_model(recipe.mixture.model_source())[0], out / "adapter")
            _save_folder(path, merged, processor)
    elif context.mesh is None:
        _save_folder(path, model, processor)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_model_state_dict(model, options=options)
        if context.is_main_process:
            _save_folder(path, model, processor, state_dict=state_dict)
    context.barrier()
    return path


def export_checkpoint(run: Path, out: Path, step: int | None = None) -> int:
    """Export a checkpoint of a finished or unfinished run for `from_pretrained`; return its step.

    Args:
        run: Output directory of the run; its `recipe.yaml` names the base model.
        out: Folder to write.
        step: Step of the checkpoint; default: the newest.

    Raises:
        SoloError: There is no such checkpoint, or the base model is missing.
    """
    if not (run / "recipe.yaml").is_file():
        raise SoloError(f"{run} is not the output directory of a run: it has no recipe.yaml")
    recipe = Recipe.load(run / "recipe.yaml")
    folder = run / "checkpoints"
    path = latest_checkpoint(folder) if step is None else folder / f"step-{step:08d}"
    if path is None or not path.is_dir():
        steps = ", ".join(str(int(found.name[5:])) for found in sorted(folder.glob("step-*")))
        raise SoloError(f"{run} has no such checkpoint" + (f"; there are steps {steps}" if steps else ""))
    model, processor = load_base_model(recipe.mixture.model_source())
    set_trainable(model, recipe.model_copy(update={"quantize": None}))
    load_checkpoint(path, model)
    if has_adapters(model):
        with TemporaryDirectory() as adapter:
            model.save_pretrained(adapter, state_dict=adapter_state_dict(model))
            model = merge_adapter(load_base_model(recipe.mixture.model_source())[0], Path(adapter))
    _save_folder(out, model, processor)
    return int(path.name.removeprefix("step-"))


def _create_partial(path: Path, partial: Path, state: TrainState) -> bool:
    """Create the folder to write into, unless the checkpoint exists; return whether to write."""
    if path.exists():
        return False
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / _STATE_FILE).write_text(json.dumps(asdict(state)))
    return True


def _trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return everything that training changes, by name; the tensors share memory with the model's."""
    parameters = dict(named_trainable(model))
    tensors = {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer is None:
        return tensors
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    # FSDP replaces the model's parameters while it has gathered them.
    if missing := [name for name, parameter in parameters.items() if parameter not in held]:
        raise RuntimeError(f"not saved or loaded: the optimizer does not hold the model's {missing[0]}")
    if len(held) > len(parameters):
        raise RuntimeError(
            f"not saved or loaded: {len(held) - len(parameters)} parameters are not the model's"
        )
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            tensors[f"optimizer/{name}/{moment}"] = optimizer.state[parameter][moment]
    return tensors


def _save_folder(path: Path, model: PreTrainedModel, processor: Any, **options: Any) -> None:
    with new_folder(path) as folder:
        save_model(folder, model, processor, **options)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
