"""The processes of a run: who they are, how they are arranged, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from solo_vlm.train.failures import fail_together
from solo_vlm.train.parallel.layout import Layout, layout
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.stopping import Stopped, StopRequest
from solo_vlm.utils.errors import SoloError

DATA, TENSOR = "data", "tensor"

LONG = timedelta(minutes=30)  # where one process may work alone: reading or writing a large model
SHORT = timedelta(minutes=5)  # where all work alike: at the start, and between steps

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    Attributes:
        rank: of this process.
        layout: how all are arranged.
        device: that this one computes on.
        mesh: (data, tensor), or None for one process that shares nothing.
    """

    rank: int
    layout: Layout
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the data this process reads."""
        return self.rank // self.layout.tensor

    def sum(self, *values: float) -> list[float]:
        """Sums over the shares of the data."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.mesh.get_group(DATA))
        return total.tolist()

    def max(self, value: int) -> int:
        """The largest value over all processes, also those that share a layer."""
        if self.mesh is None:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """The values of all shares of the data, in their order, for every process."""
        if self.mesh is None:
            return [value]
        gathered: list[Any] = [None] * self.layout.processes
        dist.all_gather_object(gathered, value)
        return gathered[:: self.layout.tensor]

    def decide(self, decision: Callable[[], Result]) -> Result:
        """What the first process finds, or its error, for every process.

        Raises:
            SoloError: as the decision raised it.
        """
        if self.mesh is None:
            return decision()
        outcome: list[Any] = [None]
        if self.is_first:
            try:
                outcome = [decision()]
            except SoloError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], SoloError):
            raise outcome[0]
        return outcome[0]

    def wait(self) -> None:
        """Continue when all processes have come here."""
        if self.mesh is not None:
            dist.barrier()

    def set_timeout(self, timeout: timedelta) -> None:
        """Limit how long this process waits for others in a collective operation, from now on."""
        if self.mesh is not None:
            for group in (None, self.mesh.get_group(DATA), self.mesh.get_group(TENSOR)):
                _set_pg_timeout(timeout, group)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Between steps, wait for others as long as it takes to write a large model."""
        self.set_timeout(LONG)
        yield
        self.set_timeout(SHORT)


@contextmanager
def start_processes(recipe: Recipe, stop: StopRequest | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun has started; alone on a CPU, no process group is needed.

    An accelerator gets a group even for one process: its weights are then held and cast by the same code.
    An exception in the body ends all processes, and only the first one is printed.

    Args:
        recipe: for the layout.
        stop: signals that the body notes.

    Raises:
        SoloError: the recipe cannot be shared among so many processes.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None and world == 1:
        yield Processes(rank, layout(recipe, world), torch.device("cpu"))
        return
    device = torch.device("cpu")
    backend = "gloo"
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.accelerator.set_device_index(device.index)
        # gloo carries what checkpoints agree upon in their own thread
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
    if world == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield _arrange(recipe, world, rank, device)
        finally:
            dist.destroy_process_group()
        return
    dist.init_process_group(backend, timeout=SHORT)  # torchrun starts all of them at once
    try:
        with fail_together(_get_default_store(), rank, stop or StopRequest()):
            yield _arrange(recipe, world, rank, device)
    except Stopped:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after a failure: it would wait for processes that are stuck


def _arrange(recipe: Recipe, world: int, rank: int, device: torch.device) -> Processes:
    arranged = layout(recipe, world)
    shape = (arranged.data, arranged.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=(DATA, TENSOR))
    processes = Processes(rank, arranged, device, mesh)
    processes.set_timeout(LONG)
    return processes
