"""Data- and tensor-parallel dimensions of a run, and the collectives of its processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from solo_vlm.data.sources import Source, fingerprints, is_same_data
from solo_vlm.train.failures import Stopped, StopRequest, fail_together
from solo_vlm.train.recipe import Recipe, TimeoutSettings
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import describe_changes, find_changes

DP, TP = "dp", "tp"  # mesh dimensions

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelDims:
    """Data- and tensor-parallel dimensions of a run.

    Attributes:
        dp: Data-parallel groups; each reads its own data, and the parameters are sharded over them.
        tp: Processes per group; they split every layer and read the same data.
        gradient_accumulation_steps: Packed sequences that each group processes one by one per optimizer step.
    """

    dp: int
    tp: int
    gradient_accumulation_steps: int

    @property
    def world_size(self) -> int:
        """Total number of processes."""
        return self.dp * self.tp

    @classmethod
    def from_recipe(cls, recipe: Recipe, world_size: int) -> Self:
        """Divide the global batch among processes, each of which takes one packed sequence at a time."""
        tp, batch, streams = recipe.parallel.tensor, recipe.global_batch, recipe.data.streams
        if world_size % tp:
            divisors = _join(_divisors(world_size))
            raise SoloError(
                f"{world_size} processes cannot form groups of parallel.tensor = {tp}: "
                f"start a multiple of {tp}, or set parallel.tensor to one of {divisors}"
            )
        dp = world_size // tp
        if batch % dp:
            fewer = [count * tp for count in _divisors(batch) if count < dp]
            raise SoloError(
                f"global_batch = {batch} is not divisible by {dp} data-parallel groups: set it to "
                f"{_join(_neighbors(batch, dp))}, or start {_join(fewer)} processes"
            )
        workers = max(recipe.data.workers, 1)
        if streams % (dp * workers):
            raise SoloError(
                f"data.streams = {streams} is not divisible by {dp} data-parallel groups x {workers} "
                f"workers: set it to {_join(_neighbors(streams, dp * workers))}"
            )
        return cls(dp, tp, batch // dp)


@dataclass(frozen=True)
class DistributedContext:
    """Rank of this process in the run, and collectives with the other processes.

    Attributes:
        mesh: Device mesh (dp, tp), or None for a single process that needs no process group.
        timeouts: Timeouts of collectives.
    """

    rank: int
    dims: ParallelDims
    device: torch.device
    mesh: DeviceMesh | None = None
    timeouts: TimeoutSettings = field(default_factory=TimeoutSettings)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Index of this process's data-parallel group."""
        return self.rank // self.dims.tp

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over the data-parallel groups."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.mesh.get_group(DP))
        return total.tolist()

    def max(self, value: int) -> int:
        """Return the largest value of all processes, tensor-parallel ones included."""
        if self.mesh is None:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """Return one value per data-parallel group, by dp rank, in every process."""
        if self.mesh is None:
            return [value]
        gathered: list[Any] = [None] * self.dims.world_size
        dist.all_gather_object(gathered, value)
        return gathered[:: self.dims.tp]

    def broadcast_from_rank0(self, compute: Callable[[], T]) -> T:
        """Call a function in rank 0 and return its result, or raise its SoloError, in every process."""
        if self.mesh is None:
            return compute()
        outcome: list[Any] = [None]
        if self.is_main_process:
            try:
                outcome = [compute()]
            except SoloError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], SoloError):
            raise outcome[0]
        return outcome[0]

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.mesh is not None:
            dist.barrier()

    def per_rank(self, value: float) -> list[float]:
        """Return one value per process, by rank, in every process."""
        values = torch.zeros(self.dims.world_size, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        if self.mesh is not None:
            dist.all_reduce(values)
        return values.tolist()

    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of all further collectives."""
        timeout = timedelta(seconds=seconds)
        if self.mesh is not None:
            for group in (None, self.mesh.get_group(DP), self.mesh.get_group(TP)):
                _set_pg_timeout(timeout, group)

    @contextmanager
    def long_timeout(self) -> Iterator[None]:
        """Extend the timeout of collectives in the body, where one process may work alone."""
        self.set_timeout(self.timeouts.start)
        yield
        self.set_timeout(self.timeouts.step)

    def check_same_settings(self, recipe: Recipe) -> None:
        """Require every process to have the recipe of process 0."""
        ours = recipe.model_dump(mode="json", exclude={"root"})  # paths may differ between machines
        theirs = self.broadcast_from_rank0(lambda: ours)
        if changed := find_changes(theirs, ours):
            raise SoloError(
                f"process {self.rank} was started with other settings than process 0 "
                f"({describe_changes(changed)}): use the same recipe everywhere"
            )

    def check_same_data(self, sources: Sequence[Source]) -> None:
        """Require every process to see the files of process 0; otherwise it would read other samples."""
        ours = fingerprints(sources)
        theirs = self.broadcast_from_rank0(lambda: ours)
        for (name, first), (_, own) in zip(theirs, ours, strict=True):
            if not is_same_data(first, own):
                raise SoloError(
                    f"process {self.rank} sees other files of source {name} than process 0: make the files "
                    "of all machines identical"
                )


@contextmanager
def init_distributed(recipe: Recipe, stop: StopRequest | None = None) -> Iterator[DistributedContext]:
    """Join the process group of torchrun; an exception in the body ends all processes of the run.

    A single CPU process needs no group. A single accelerator gets one, so that its weights are stored and
    cast by the same code as those of many.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None and world_size == 1:
        yield DistributedContext(rank, ParallelDims.from_recipe(recipe, world_size), torch.device("cpu"))
        return
    device = torch.device("cpu")
    backend = "gloo"
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
        # gloo carries the coordination of asynchronous checkpoints, which runs in its own thread.
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
    if world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield _make_context(recipe, world_size, rank, device)
        finally:
            dist.destroy_process_group()
        return
    # torchrun starts all processes at once.
    dist.init_process_group(backend, timeout=timedelta(seconds=recipe.timeouts.step))
    try:
        with fail_together(_get_default_store(), rank, stop or StopRequest()):
            yield _make_context(recipe, world_size, rank, device)
    except Stopped:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after a failure: it would wait for processes that hang


def _make_context(recipe: Recipe, world_size: int, rank: int, device: torch.device) -> DistributedContext:
    dims = ParallelDims.from_recipe(recipe, world_size)
    mesh = init_device_mesh(device.type, (dims.dp, dims.tp), mesh_dim_names=(DP, TP))
    context = DistributedContext(rank, dims, device, mesh, recipe.timeouts)
    context.set_timeout(recipe.timeouts.start)
    return context


def _neighbors(number: int, divisor: int) -> list[int]:
    """Return the nearest positive multiples of a divisor below and above a number."""
    below = number // divisor * divisor
    return [multiple for multiple in (below, below + divisor) if multiple]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _join(numbers: list[int]) -> str:
    *others, last = [str(number) for number in numbers]
    return f"{', '.join(others)} or {last}" if others else last
