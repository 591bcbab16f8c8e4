"""Timing, memory measurement and models on this machine, a CPU or one GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import logging

from solo_vlm.train.estimate.memory import recognize_device
from solo_vlm.train.metrics import memory_gb
from solo_vlm.train.parallel.context import DistributedContext, init_distributed, make_context
from solo_vlm.train.parallel.sharding import FSDP_UNIT_SIZE, shard_model
from solo_vlm.train.recipe import Recipe

Result = TypeVar("Result")


def this_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def in_fresh_process(task: Callable[..., Result], *arguments: Any) -> Result:
    """Run a task in a new process, so that its peak memory is the task's, and return the result."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the command `solo`
    with ProcessPoolExecutor(1, get_context("spawn"), logging.set_verbosity_error) as fresh:
        return fresh.submit(task, *arguments).result()


def seconds(task: Callable[[], Any], device: torch.device) -> float:
    """Return the wall-clock time of a task until the device has finished it."""
    _wait(device)
    started = time.perf_counter()
    task()
    _wait(device)
    return time.perf_counter() - started


@contextmanager
def one_sharded_process(recipe: Recipe) -> Iterator[DistributedContext]:
    """Set up this process like a single GPU process, with parameters managed by FSDP2, also on a CPU."""
    with init_distributed(recipe) as alone:
        if alone.mesh is not None:
            yield alone
            return
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield make_context(recipe, 1, 0, alone.device)
        finally:
            dist.destroy_process_group()


def peak_growth(task: Callable[[], Any], device: torch.device) -> float:
    """Return the peak memory of a task in gigabytes, above the memory in use when it begins.

    On a CPU, it must be the first large task of a new process, because a process's peak never falls.
    """
    if device.type == "cpu":
        held = psutil.Process().memory_info().rss
    else:
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    task()
    return memory_gb(device) - held / 1e9


def peak_flops(device: torch.device) -> float | None:
    """Return the published FLOPs per second in bfloat16; None if they are unknown."""
    known = recognize_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.peak_flops if known else None


def random_model(
    kind: type[PreTrainedModel],
    config: Any,
    recipe: Recipe,
    context: DistributedContext,
    freeze: Callable[[PreTrainedModel], None] = lambda model: None,
    unit: int = FSDP_UNIT_SIZE,
) -> PreTrainedModel:
    """Make a model with random weights, sharded and cast as in training.

    Args:
        kind: Class of the model, created from `config`.
        config: Configuration of the model.
        recipe: Recipe with precision and parallelism.
        context: Context of the process; without a mesh, the model is not sharded.
        freeze: Function that freezes parameters.
        unit: Parameters gathered together; see `shard_model`.
    """
    torch.manual_seed(0)
    with context.device:
        model = kind(config)
    freeze(model)
    if context.mesh is not None:
        shard_model(model, recipe, context, unit)
    return model.train()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
