"""Parallel dimensions of a run, and the collectives of its processes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from solo_vlm.data.mixture import Mixture
from solo_vlm.data.sources import Source
from solo_vlm.data.sources.sharing import pack_sources, unpack_sources
from solo_vlm.train.failures import Stopped, StopRequest, fail_together
from solo_vlm.train.recipe import Recipe, TimeoutSettings
from solo_vlm.utils.errors import SoloError, first_line
from solo_vlm.utils.settings import describe_changes, find_changes

DP, CP, TP = "dp", "cp", "tp"  # dimensions of the mesh by which data is divided
REPLICATE, SHARD = "replicate", "shard"  # and, with TP, of the mesh by which parameters are

T = TypeVar("T")

# Variables in which launchers that start several processes, but not as torchrun does, give their number.
_OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParallelDims:
    """Parallel dimensions of a run.

    Attributes:
        dp: Data-parallel groups; each reads its own data.
        tp: Processes that split every layer and read the same data.
        gradient_accumulation_steps: Packed sequences that each group processes one by one per optimizer step.
        cp: Processes (each of them `tp` processes) that compute a slice of every packed sequence.
        replicate: Copies of the parameters; each is sharded over the processes of `dp / replicate` groups.
    """

    dp: int
    tp: int
    gradient_accumulation_steps: int
    cp: int = 1
    replicate: int = 1

    @property
    def world_size(self) -> int:
        """Total number of processes."""
        return self.dp * self.cp * self.tp

    @property
    def shards(self) -> int:
        """Processes that share one copy of what tensor parallelism leaves of the parameters."""
        return self.dp * self.cp // self.replicate

    @classmethod
    def from_recipe(cls, recipe: Recipe, world_size: int) -> Self:
        """Divide the global batch among processes, each of which takes one packed sequence at a time."""
        tp, cp, replicate = recipe.parallel.tensor, recipe.parallel.context, recipe.parallel.replicate
        batch, streams, length = recipe.global_batch, recipe.streams, recipe.data.sequence_length
        group = tp * cp
        if world_size % group:
            setting, size = ("tensor", tp) if cp == 1 else ("tensor x parallel.context", group)
            divisors = _join(_divisors(world_size))
            raise SoloError(
                f"{world_size} processes cannot form groups of parallel.{setting} = {size}: "
                f"start a multiple of {size}, or set parallel.{setting} to {divisors}"
            )
        dp = world_size // group
        if dp % replicate:
            raise SoloError(
                f"parallel.replicate = {replicate} does not divide {dp} data-parallel groups: set it to "
                f"{_join(_divisors(dp))}"
            )
        if length % cp:
            raise SoloError(
                f"data.sequence_length = {length} is not divisible by parallel.context = {cp}: set it to "
                f"{_join(_neighbors(length, cp))}"
            )
        if batch % dp:
            fewer = [count * group for count in _divisors(batch) if count < dp]
            more = "parallel.context and parallel.tensor use"
            beyond = f"; beyond global_batch, only {more} more processes" if dp > batch else ""
            raise SoloError(
                f"global_batch = {batch} is not divisible by {dp} data-parallel groups: set it to "
                f"{_join(_neighbors(batch, dp))}, or start {_join(fewer)} processes{beyond}"
            )
        workers = max(recipe.data.workers, 1)
        if streams % (dp * workers):
            raise SoloError(
                f"data.streams = {streams} is not divisible by {dp} data-parallel groups x {workers} "
                f"workers: set it to {_join(_neighbors(streams, dp * workers))}"
            )
        return cls(dp, tp, batch // dp, cp, replicate)


@dataclass(frozen=True)
class DistributedContext:
    """Rank of this process in the run, and collectives with the other processes.

    Attributes:
        mesh: Device mesh (dp, cp, tp), or None for a single process that needs no process group.
        parameter_mesh: Device mesh (replicate, shard, tp) of the same processes.
        timeouts: Timeouts of collectives.
    """

    rank: int
    dims: ParallelDims
    device: torch.device
    mesh: DeviceMesh | None = None
    parameter_mesh: DeviceMesh | None = None
    timeouts: TimeoutSettings = field(default_factory=TimeoutSettings)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Index of this process's data-parallel group."""
        return self.rank // (self.dims.cp * self.dims.tp)

    @property
    def cp_rank(self) -> int:
        """Index of this process's slice of every packed sequence."""
        return self.rank // self.dims.tp % self.dims.cp

    @property
    def slices(self) -> DeviceMesh | None:
        """Processes that compute the slices of this process's packed sequences, in order; None: itself."""
        return self.mesh[CP] if self.mesh is not None and self.dims.cp > 1 else None

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over the data-parallel groups."""
        return self._sum(DP, values)

    def sum_groups(self, values: Tensor) -> Tensor:
        """Return the values of the first process of each data-parallel group, summed, in every process."""
        if self.mesh is None:
            return values
        total = values * (self.cp_rank == 0 and self.rank % self.dims.tp == 0)
        dist.all_reduce(total)
        return total

    def sum_slices(self, *values: float) -> list[float]:
        """Return each value of this process's slices of packed sequences summed over all slices."""
        return list(values) if self.dims.cp == 1 else self._sum(CP, values)

    def _sum(self, dimension: str, values: Sequence[float]) -> list[float]:
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.mesh.get_group(dimension))
        return total.tolist()

    def max(self, value: int) -> int:
        """Return the largest value of all processes."""
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
        return gathered[:: self.dims.cp * self.dims.tp]

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
            assert self.parameter_mesh is not None
            for group in (None, *self.mesh.get_all_groups(), *self.parameter_mesh.get_all_groups()):
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

    def open_sources(self, mixture: Mixture) -> list[Source]:
        """Open a mixture's sources in process 0, and share them: only that process lists and indexes files.

        Raises:
            SoloError: As for `Mixture.open_sources`; or this process sees other files.
        """
        if self.mesh is None:
            return mixture.open_sources()
        opened: list[Source] = []

        def pack() -> bytes:
            opened.extend(mixture.open_sources())
            return pack_sources(opened, mixture.root)

        packed = self.broadcast_from_rank0(pack)
        others = max(self.dims.world_size - 1, 1)
        return opened or unpack_sources(packed, mixture.root, self.rank % others, others)


def launched_as(environment: Mapping[str, str], devices: int) -> tuple[int, int, int]:
    """Return rank, number of processes, and rank on this machine, as torchrun and its like tell a process.

    Args:
        devices: Accelerators that this process sees.

    Raises:
        SoloError: A variable is missing, this process has no accelerator of its own, or a launcher started
            several processes that would all train alone.
    """
    world_size = number_in(environment, "WORLD_SIZE", 1)
    local_rank = number_in(environment, "LOCAL_RANK", 0)
    if world_size == 1:
        for variable, launcher in _OTHER_LAUNCHERS.items():
            if (started := number_in(environment, variable, 1)) > 1:
                raise SoloError(
                    f"{launcher} started {started} processes that do not know each other, so each would "
                    "train alone: let it start torchrun once per machine, as in examples/cluster/slurm.sh"
                )
        if devices > 1:
            logger.warning(
                "training on one of %d devices; on all: torchrun --nproc-per-node %d -m solo_vlm train ...",
                devices,
                devices,
            )
        return 0, 1, local_rank
    needed = ["RANK", "MASTER_ADDR", "MASTER_PORT", *(["LOCAL_RANK"] if devices > 1 else [])]
    if missing := [name for name in needed if not environment.get(name)]:
        raise SoloError(
            f"WORLD_SIZE is set ({world_size}), but {' and '.join(missing)} not: "
            "start the processes with torchrun"
        )
    if 0 < devices <= local_rank:
        raise SoloError(
            f"process {local_rank} of this machine has no device, because it sees {devices}: "
            f"start at most {devices} per machine (torchrun --nproc-per-node {devices})"
        )
    rank = number_in(environment, "RANK", 0)
    if not 0 <= rank < world_size:
        raise SoloError(
            f"RANK = {rank} is not below WORLD_SIZE = {world_size}: start the processes with torchrun"
        )
    return rank, world_size, local_rank


def number_in(environment: Mapping[str, str], variable: str, default: int) -> int:
    """Return the number in a variable of the environment, or the default if it is unset or empty."""
    try:
        return int(environment.get(variable) or default)
    except ValueError as error:
        raise SoloError(
            f"{variable} = {environment[variable]} is not a number: unset it, or start the processes with "
            "torchrun"
        ) from error


@contextmanager
def init_distributed(recipe: Recipe, stop: StopRequest | None = None) -> Iterator[DistributedContext]:
    """Join the process group of torchrun; an exception in the body ends all processes of the run.

    A single CPU process needs no group. A single accelerator gets one, so that its weights are stored and
    cast by the same code as those of many.
    """
    rank, world_size, local_rank = launched_as(os.environ, torch.accelerator.device_count())
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None and world_size == 1:
        yield DistributedContext(rank, ParallelDims.from_recipe(recipe, world_size), torch.device("cpu"))
        return
    device = torch.device("cpu")
    backend = "gloo"
    if accelerator is not None:
        device = torch.device(accelerator.type, local_rank)
        torch.accelerator.set_device_index(device.index)
        # gloo carries the coordination of asynchronous checkpoints, which runs in its own thread.
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
    if world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield make_context(recipe, world_size, rank, device)
        finally:
            dist.destroy_process_group()
        return
    timeout = timedelta(seconds=recipe.timeouts.start)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise SoloError(
            f"the {world_size} processes did not meet at {address} (MASTER_ADDR, MASTER_PORT): "
            f"{first_line(error)}; process 0 has to run there, and the port to be free and open to the others"
        ) from error
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=recipe.timeouts.step),
        store=store_of_attempt(store, rank, world_size, timeout),
        rank=rank,
        world_size=world_size,
    )
    try:
        with fail_together(_get_default_store(), rank, stop or StopRequest()):
            yield make_context(recipe, world_size, rank, device)
    except Stopped:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after a failure: it would wait for processes that hang


def store_of_attempt(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Join the processes of this attempt in a part of the store that has no keys of earlier attempts.

    When torchrun restarts processes, its store still has the addresses of those that are gone, and their
    failure. Its restart count does not tell attempts apart: each machine counts its own. Each process makes a
    call under a name never used before, and process 0 answers all calls with the name of the part.

    Raises:
        SoloError: A process did not join before the timeout.
    """
    if rank:
        call = uuid4().hex
        store.set(f"call/{rank}", call)
        try:
            store.wait([f"answer/{call}"], timeout)
        except dist.DistStoreError as error:
            raise SoloError(f"process 0 of {world_size} did not join the run within {timeout}") from error
        name = store.get(f"answer/{call}").decode()
        store.set(f"{name}/joined/{call}", "")
        return PrefixStore(name, store)
    name = uuid4().hex
    calls: dict[int, str] = {}
    deadline = time.monotonic() + timeout.total_seconds()
    while (joined := 1 + sum(store.check([f"{name}/joined/{call}"]) for call in calls.values())) < world_size:
        if time.monotonic() > deadline:
            raise SoloError(f"only {joined} of {world_size} processes joined the run within {timeout}")
        for other in range(1, world_size):
            # The call may be of an earlier attempt; the process replaces it when it joins this one.
            call = store.get(f"call/{other}").decode() if store.check([f"call/{other}"]) else ""
            if call and call != calls.get(other):
                store.set(f"answer/{call}", name)
                calls[other] = call
        time.sleep(0.02)
    return PrefixStore(name, store)


def make_context(recipe: Recipe, world_size: int, rank: int, device: torch.device) -> DistributedContext:
    """Divide the processes of the initialized group; collectives have the timeout of the start."""
    dims = ParallelDims.from_recipe(recipe, world_size)
    mesh = init_device_mesh(device.type, (dims.dp, dims.cp, dims.tp), mesh_dim_names=(DP, CP, TP))
    parameter_mesh = init_device_mesh(
        device.type, (dims.replicate, dims.shards, dims.tp), mesh_dim_names=(REPLICATE, SHARD, TP)
    )
    context = DistributedContext(rank, dims, device, mesh, parameter_mesh, recipe.timeouts)
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
