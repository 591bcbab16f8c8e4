"""Sharded, asynchronous checkpoints of a run, and export to a model folder for transformers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
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
from solo_vlm.train.inputs import check_inputs, fingerprint_model, load_recipe
from solo_vlm.train.model import (
    adapter_state_dict,
    has_adapters,
    load_base_model,
    merge_adapter,
    set_trainable,
)
from solo_vlm.train.optimizer import named_trainable
from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.train.parallel.export import can_save_sharded, save_sharded
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.storage import (
    CHECKSUMS_FILE,
    STATE_FILE,
    CheckpointReader,
    CheckpointStore,
    CheckpointWriter,
    Folder,
    step_of,
)
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_folder

_FLOAT32_BYTES = 4
_GATHERED_SIZE = 4 * 10**9  # bytes of a sharded model that one process gathers, to export it as a single file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """Best evaluation of a run so far: metric, its value, and the step."""

    metric: str
    value: float
    step: int


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: Optimizer steps done, including skipped ones.
        total_steps: Optimizer steps of the whole run.
        tokens: Tokens processed, including padding.
        skipped_steps: Steps skipped for a non-finite loss or gradient.
        data: Merged state of the data loaders of all ranks.
        productive_seconds: Seconds that the steps took, without waiting for data.
        best: Best evaluation, whose checkpoint is kept.
        stale_evaluations: Evaluations since the best.
        stopped: Reason why the run ended early; empty if it did not.
        is_data_used: Whether the data ended after this step.
    """

    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    data: dict[str, Any] | None = None
    productive_seconds: float = 0.0
    best: Best | None = None
    stale_evaluations: int = 0
    stopped: str = ""
    is_data_used: bool = False


class Checkpointer:
    """Writer of checkpoints in torch's distributed format.

    They hold the trainable parameters and buffers, the optimizer's state, `training_state.json`, and the
    checksums of all files. No RNG state is needed, because each step reseeds. Any number of processes can
    load them.

    Args:
        keep: Number of newest checkpoints to keep, besides the best.
        asynchronous: Whether `save` returns before the files are written.
    """

    def __init__(
        self, store: CheckpointStore, keep: int, asynchronous: bool, context: DistributedContext
    ) -> None:
        self._store = store
        self._keep = keep
        self._asynchronous = asynchronous
        self._context = context
        # A separate group, because a background thread communicates.
        timeout = timedelta(seconds=context.timeouts.start)
        self._group = None if context.mesh is None else dist.new_group(backend="gloo", timeout=timeout)
        self._finalizer = ThreadPoolExecutor(1, "checkpoint-finalizer")
        self._pending: Future[Any] | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Save the current step unless it is already saved; wait for a pending checkpoint first."""
        self.wait()
        tensors = _trained_tensors(model, optimizer)
        # Checked in rank 0: on a network file system, processes may see different states of a folder.
        folder = self._context.broadcast_from_rank0(
            lambda: self._store.begin(state.step, json.dumps(asdict(state)))
        )
        if folder is None:
            return
        writer = CheckpointWriter(folder)
        future: Any = async_save(
            tensors,
            storage_writer=writer,
            process_group=self._group,
            no_dist=self._group is None,
        )
        # Rank 0 finishes last, because it collects the metadata of all ranks.
        is_main = self._context.is_main_process
        best = state.best.step if state.best else None
        self._pending = self._finalizer.submit(self._finalize, future, writer, best) if is_main else future
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
            with self._store.folder.accessing():
                pending.result(timeout)

    def _finalize(self, written: Future[Any], writer: CheckpointWriter, best: int | None) -> None:
        """Complete a checkpoint and delete old ones, except the best, in the background."""
        store = self._store
        try:
            written.result()
            store.commit(writer.folder, writer.checksums)
        except BaseException:
            store.discard(writer.folder)
            raise
        for old in store.checkpoints()[: -self._keep]:
            if step_of(old) != best:
                store.delete(old)


def warn_if_disk_is_short(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Log a warning if a run with checkpoints in `out` will need more space than is free.

    Args:
        keep: Number of checkpoints to keep.
    """
    checkpoint = sum(t.numel() * t.element_size() for t in _trained_tensors(model, optimizer).values())
    exported = _float32_bytes(model)
    present = sum(file.stat().st_size for file in (out / "checkpoints").rglob("*") if file.is_file())
    needed, free = (keep + 1) * checkpoint + exported - present, shutil.disk_usage(out).free
    if needed > free:
        logger.warning(
            "%s has %.2f GB free, but the run needs about %.2f GB more: %d checkpoints of %.2f GB, one more "
            "while it is saved, and a model of %.2f GB. A run that fills the disk stops and can be resumed.",
            *(out, free / 1e9, needed / 1e9, keep, checkpoint / 1e9, exported / 1e9),
        )


def load_train_state(path: Folder) -> TrainState:
    """Read the progress of the run from a checkpoint."""
    try:
        values = json.loads(path.read(STATE_FILE))
        state = TrainState(**{**values, "best": Best(**values["best"]) if values.get("best") else None})
    except (OSError, ValueError, TypeError) as error:
        raise SoloError(f"cannot resume from {path}: {STATE_FILE} is not readable: {error}") from error
    if state.step != step_of(path):
        raise SoloError(f"cannot resume from {path}: {STATE_FILE} is of step {state.step}: rename it")
    if not state.data:
        raise SoloError(f"cannot resume from {path}: {STATE_FILE} has no position in the data")
    return state


def load_checkpoint(path: Folder, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load the trainable parameters and buffers, and the optimizer's moments, in place.

    Raises:
        SoloError: A file is missing, damaged or not the checkpoint's, or the tensors do not fit the model.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if damage := find_damage(path, rank, ranks):
        raise SoloError(f"cannot load the checkpoint {path}: {damage}; {_advise_older(path)}")
    tensors = _trained_tensors(model, optimizer)
    try:
        with path.accessing():
            load(tensors, storage_reader=CheckpointReader(path), no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise SoloError(f"cannot load the checkpoint {path}: {reason}") from error


def find_damage(path: Folder, rank: int = 0, ranks: int = 1) -> str | None:
    """Compare the files of a checkpoint with its checksums.

    Args:
        rank: Rank of this process; the `ranks` processes divide the files among them.

    Returns:
        Description of the first damage, with the file name; None if there is no damage.
    """
    try:
        expected = json.loads(path.read(CHECKSUMS_FILE))
        checksums = {str(name): (int(size), str(value)) for name, (size, value) in expected.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS_FILE} is missing or damaged ({error})"
    found = path.entries()
    if missing := sorted(checksums.keys() - found.keys()):
        return f"{missing[0]} is missing"
    visible = {name for name in found if not name.startswith(".")}  # a file system may have hidden ones
    if extra := sorted(visible - checksums.keys() - {CHECKSUMS_FILE}):
        return f"{extra[0]} is not one of its files"
    for name in sorted(checksums)[rank::ranks]:
        size, value = checksums[name]
        if found[name] != size:
            return f"{name} has {found[name] or 0:,} bytes, but {size:,} were written"
        if path.checksum(name) != (size, value):
            return f"{name} is damaged: its checksum differs"
    return None


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
    elif _float32_bytes(model) > _GATHERED_SIZE and can_save_sharded(model) and _is_shared(out, context):
        save_sharded(path, model, processor, context)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_model_state_dict(model, options=options)
        if context.is_main_process:
            _save_folder(path, model, processor, state_dict=state_dict)
    context.barrier()
    return path


def _is_shared(out: Path, context: DistributedContext) -> bool:
    """Return whether all processes see the output directory of rank 0; a collective call."""
    probe = context.broadcast_from_rank0(lambda: Path(mkdtemp(prefix=".shared-", dir=out)))
    is_unseen = context.max(not probe.is_dir())
    if context.is_main_process:
        probe.rmdir()
    return not is_unseen


def export_checkpoint(run: str | Path, out: Path, step: int | None = None, best: bool = False) -> int:
    """Export a checkpoint of a finished or unfinished run for `from_pretrained`; return its step.

    Args:
        run: Output directory of the run, or the folder or URL of its checkpoints; its `recipe.yaml` names the
            base model.
        out: Folder to write.
        step: Step of the checkpoint; default: the newest.
        best: Export the best by the recipe's `validation.best` instead.

    Raises:
        SoloError: There is no such checkpoint, or the base model is missing.
    """
    folder = Folder(run)
    recipe = load_recipe(folder)
    if recipe is None:
        raise SoloError(f"{run} is not the output directory of a run: it has no recipe.yaml")
    # `run` may be the folder of the checkpoints itself.
    found = CheckpointStore(run).checkpoints() or CheckpointStore.of(recipe, folder.path).checkpoints()
    by_step = {step_of(each): each for each in found}
    if best:
        step = _best_step(run, recipe, by_step)
    path = by_step.get(max(by_step, default=0) if step is None else step)
    if path is None:
        steps = ", ".join(map(str, by_step))
        raise SoloError(f"{run} has no such checkpoint" + (f"; there are steps {steps}" if steps else ""))
    check_inputs(folder, fingerprint_model(recipe), prefix=f"{recipe.model}/")
    model, processor = load_base_model(recipe.mixture.model_source())
    set_trainable(model, recipe.model_copy(update={"quantize": None}))
    load_checkpoint(path, model)
    if has_adapters(model):
        with TemporaryDirectory() as adapter:
            model.save_pretrained(adapter, state_dict=adapter_state_dict(model))
            model = merge_adapter(load_base_model(recipe.mixture.model_source())[0], Path(adapter))
    _save_folder(out, model, processor)
    return step_of(path)


def _best_step(run: str | Path, recipe: Recipe, by_step: Mapping[int, Folder]) -> int:
    """Return the step of a run's best evaluation, which the newest checkpoint knows."""
    if recipe.validation is None or recipe.validation.best is None:
        raise SoloError(f"{run} has no best checkpoint: its recipe does not set validation.best")
    best = load_train_state(by_step[max(by_step)]).best if by_step else None
    if best is None:
        raise SoloError(f"{run} has no best checkpoint yet: no finite {recipe.validation.best} so far")
    return best.step


def _advise_older(path: Folder) -> str:
    """Return the end of the message about a damaged checkpoint: the newest intact one before it."""
    older = [
        found for found in CheckpointStore(path.parent.url).checkpoints() if step_of(found) < step_of(path)
    ]
    intact = next((found for found in reversed(older) if find_damage(found) is None), None)
    if intact is None:
        return "there is no older one that is intact: start a new run with out=..."
    return (
        f"{intact.name} is intact: move {path.name} to another folder, and the same command uses step "
        f"{step_of(intact)}"
    )


def _trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return everything that training changes, by name; the tensors share memory with the model's."""
    parameters = dict(named_trainable(model))
    tensors = {f"model/{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"model/{name}": model.get_buffer(name) for name in getattr(model, "trained_buffers", ())}
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
        for moment, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{moment}"] = tensor
    return tensors


def _float32_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) * _FLOAT32_BYTES


def _save_folder(path: Path, model: PreTrainedModel, processor: Any, **options: Any) -> None:
    with new_folder(path) as folder:
        save_model(folder, model, processor, **options)
