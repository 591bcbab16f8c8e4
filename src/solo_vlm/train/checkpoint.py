"""Sharded, asynchronous checkpoints of a run, and export to a model folder for transformers."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from transformers import PreTrainedModel

from solo_vlm.models.load import save_model
from solo_vlm.train.inputs import check_inputs, fingerprint_model
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
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_folder, remove, sync, write_text, writing

_STATE_FILE = "training_state.json"
_METADATA_FILE = ".metadata"  # torch's
_CHECKSUMS_FILE = "checksums.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL_PREFIX = ".partial-"  # as in utils/files.py, but with a name that all processes know
_BLOCK_SIZE = 1 << 20
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


class Checkpointer:
    """Writer of checkpoints, as folders `step-NNNNNNNN` in torch's distributed format.

    They hold the trainable parameters, the optimizer's state, `training_state.json`, and the checksums of
    all files. No RNG state is needed, because each step reseeds. Any number of processes can load them.

    Args:
        keep: Number of newest checkpoints to keep, besides the best.
        asynchronous: Whether `save` returns before the files are written.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool, context: DistributedContext) -> None:
        self._folder = folder
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
        path = self._folder / f"step-{state.step:08d}"
        partial = self._folder / f"{_PARTIAL_PREFIX}{path.name}"
        # Checked in rank 0: on a network file system, processes may see different states of a folder.
        if not self._context.broadcast_from_rank0(lambda: _create_partial(path, partial, state)):
            return
        future: Any = async_save(
            tensors,
            storage_writer=_ChecksumWriter(partial),
            process_group=self._group,
            no_dist=self._group is None,
        )
        # Rank 0 finishes last, because it collects the metadata of all ranks.
        is_main = self._context.is_main_process
        best = state.best.step if state.best else None
        self._pending = (
            self._finalizer.submit(self._finalize, future, partial, path, best) if is_main else future
        )
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
            with writing(self._folder):
                pending.result(timeout)

    def _finalize(self, written: Future[Any], partial: Path, path: Path, best: int | None) -> None:
        """Rename a complete checkpoint and delete old ones, except the best, in the background."""
        try:
            written.result()
            sync(partial)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # a failed save may have filled the disk
        sync(path.parent)
        for old in find_checkpoints(path.parent)[: -self._keep]:
            if step_of(old) == best:
                continue
            # Renamed first, so that a crash cannot leave half a checkpoint under a valid name.
            shutil.rmtree(old.rename(old.with_name(f"{_PARTIAL_PREFIX}{old.name}")))


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first; copies under other names do not count."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def warn_if_disk_is_short(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Log a warning if the run will need more space for checkpoints and the exported model than is free."""
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


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a crash left half saved or half deleted; requires the lock of the run."""
    for path in folder.glob(f"{_PARTIAL_PREFIX}step-*"):
        remove(path)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint from the name of its folder."""
    return int(path.name.removeprefix("step-"))


def load_train_state(path: Path) -> TrainState:
    """Read the progress of the run from a checkpoint."""
    try:
        values = json.loads((path / _STATE_FILE).read_text())
        state = TrainState(**{**values, "best": Best(**values["best"]) if values.get("best") else None})
    except (OSError, ValueError, TypeError) as error:
        raise SoloError(f"cannot resume from {path}: {_STATE_FILE} is not readable: {error}") from error
    if state.step != step_of(path):
        raise SoloError(f"cannot resume from {path}: {_STATE_FILE} is of step {state.step}: rename it")
    if not state.data:
        raise SoloError(f"cannot resume from {path}: {_STATE_FILE} has no position in the data")
    return state


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load the trainable parameters, and the optimizer's moments, in place.

    Raises:
        SoloError: A file is missing, damaged or not the checkpoint's, or the tensors do not fit the model.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if damage := find_damage(path, rank, ranks):
        raise SoloError(f"cannot load the checkpoint {path}: {damage}; {_advise_older(path)}")
    tensors = _trained_tensors(model, optimizer)
    try:
        load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise SoloError(f"cannot load the checkpoint {path}: {reason}") from error


def find_damage(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Compare the files of a checkpoint with its checksums.

    Args:
        rank: Rank of this process; the `ranks` processes divide the files among them.

    Returns:
        Description of the first damage, with the file name; None if there is no damage.
    """
    try:
        expected = json.loads((path / _CHECKSUMS_FILE).read_text())
        checksums = {str(name): (int(size), str(value)) for name, (size, value) in expected.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{_CHECKSUMS_FILE} is missing or damaged ({error})"
    found = {file.name for file in path.iterdir()}
    if missing := sorted(checksums.keys() - found):
        return f"{missing[0]} is missing"
    visible = {name for name in found if not name.startswith(".")}  # a file system may have hidden ones
    if extra := sorted(visible - checksums.keys() - {_CHECKSUMS_FILE}):
        return f"{extra[0]} is not one of its files"
    for name in sorted(checksums)[rank::ranks]:
        size, value = checksums[name]
        if (actual := (path / name).stat().st_size) != size:
            return f"{name} has {actual:,} bytes, but {size:,} were written"
        if _checksum(path / name) != value:
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
    elif _float32_bytes(model) > _GATHERED_SIZE and can_save_sharded(model):
        save_sharded(path, model, processor, context)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_model_state_dict(model, options=options)
        if context.is_main_process:
            _save_folder(path, model, processor, state_dict=state_dict)
    context.barrier()
    return path


def export_checkpoint(run: Path, out: Path, step: int | None = None, best: bool = False) -> int:
    """Export a checkpoint of a finished or unfinished run for `from_pretrained`; return its step.

    Args:
        run: Output directory of the run; its `recipe.yaml` names the base model.
        out: Folder to write.
        step: Step of the checkpoint; default: the newest.
        best: Export the best by the recipe's `validation.best` instead.

    Raises:
        SoloError: There is no such checkpoint, or the base model is missing.
    """
    if not (run / "recipe.yaml").is_file():
        raise SoloError(f"{run} is not the output directory of a run: it has no recipe.yaml")
    recipe = Recipe.load(run / "recipe.yaml")
    folder = run / "checkpoints"
    by_step = {step_of(found): found for found in find_checkpoints(folder)}
    if best:
        step = _best_step(run, recipe, by_step)
    path = by_step.get(max(by_step, default=0) if step is None else step)
    if path is None:
        steps = ", ".join(map(str, by_step))
        raise SoloError(f"{run} has no such checkpoint" + (f"; there are steps {steps}" if steps else ""))
    check_inputs(run, fingerprint_model(recipe), prefix=f"{recipe.model}/")
    model, processor = load_base_model(recipe.mixture.model_source())
    set_trainable(model, recipe.model_copy(update={"quantize": None}))
    load_checkpoint(path, model)
    if has_adapters(model):
        with TemporaryDirectory() as adapter:
            model.save_pretrained(adapter, state_dict=adapter_state_dict(model))
            model = merge_adapter(load_base_model(recipe.mixture.model_source())[0], Path(adapter))
    _save_folder(out, model, processor)
    return step_of(path)


def _best_step(run: Path, recipe: Recipe, by_step: Mapping[int, Path]) -> int:
    """Return the step of a run's best evaluation, which the newest checkpoint knows."""
    if recipe.validation is None or recipe.validation.best is None:
        raise SoloError(f"{run} has no best checkpoint: its recipe does not set validation.best")
    best = load_train_state(by_step[max(by_step)]).best if by_step else None
    if best is None:
        raise SoloError(f"{run} has no best checkpoint yet: no finite {recipe.validation.best} so far")
    return best.step


def _create_partial(path: Path, partial: Path, state: TrainState) -> bool:
    """Create the folder to write into, unless the checkpoint exists; return whether to write."""
    if path.exists():
        return False
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_text(partial / _STATE_FILE, json.dumps(asdict(state)))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return True


class _ChecksumWriter(FileSystemWriter):
    """Torch's writer with checksums: each process computes those of its files, and rank 0 collects them."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        folder, names = Path(self.path), {result.storage_data.relative_path for result in written.wait()}
        own = folder / f"{plan.storage_data.prefix}{_CHECKSUMS_FILE}"
        write_text(own, json.dumps(_checksums(folder, sorted(names))))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        folder = Path(self.path)
        parts = list(folder.glob(f"__*_{_CHECKSUMS_FILE}"))
        own = _checksums(folder, [_METADATA_FILE, _STATE_FILE])
        for part in parts:
            own |= json.loads(part.read_text())
        write_text(folder / _CHECKSUMS_FILE, json.dumps(own, indent=1))
        for part in parts:
            part.unlink()


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return size and checksum of files by name."""
    return {name: ((folder / name).stat().st_size, _checksum(folder / name)) for name in names}


def _checksum(file: Path) -> str:
    """Return the CRC-32 of a file: it finds damage, not intent, and costs less than reading the file."""
    value, block = 0, memoryview(bytearray(_BLOCK_SIZE))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            value = zlib.crc32(block[:count], value)
    return f"{value:08x}"


def _advise_older(path: Path) -> str:
    """Return the end of the message about a damaged checkpoint: the newest intact one before it."""
    older = [found for found in find_checkpoints(path.parent) if step_of(found) < step_of(path)]
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
