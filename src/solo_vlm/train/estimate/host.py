"""Main memory that a machine needs: open shards, packers, loaders, staged checkpoints, and the model."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from solo_vlm.data.row_order import open_bytes
from solo_vlm.train.estimate.layout import Layout
from solo_vlm.train.estimate.memory import memory_per_device, trained_parameters
from solo_vlm.train.recipe import Recipe

DEVICES = 8  # per machine, at most

_FLOAT32 = 4  # bytes
_TOKEN = 3 * 8  # bytes of its ID, label and position
_WAITING_TOKEN = 4 + 1  # bytes of its ID, and whether it is supervised
_PROCESS = 600_000_000  # bytes of Python, torch and transformers: resident memory of a small run
_PREFETCHED = 2  # packed sequences per worker
_COMPRESSED = 0.13  # size of a photograph's file, relative to its patches (docs/performance.md)
_DOCUMENT_LENGTH = 1056  # tokens of a document without data to estimate from: an image of 1024 x 1024


@dataclass(frozen=True)
class HostMemory:
    """Main memory of the machine of rank 0, in bytes; all others need no `model`.

    Attributes:
        processes: Training processes and their workers, without data.
        shards: Rows of open shards, from which streams draw, at most.
        packers: Documents that wait to be packed, in all streams of the machine, with compressed images.
        sequences: Packed sequences that are formed, or that workers have ready.
        staging: Copy of a checkpoint that is written in the background.
        model: Weights that rank 0 reads and distributes, until the first step.
    """

    processes: int
    shards: int
    packers: int
    sequences: int
    staging: int
    model: int

    @property
    def total(self) -> int:
        """Total bytes."""
        return sum(astuple(self))


def host_memory(
    layout: Layout,
    recipe: Recipe,
    vision_share: float = 1.0,
    document_length: float = _DOCUMENT_LENGTH,
    tokens: float = math.inf,
) -> HostMemory:
    """Return the main memory of the machine of rank 0.

    Args:
        vision_share: Share of vision tokens, whose patches are held as bytes.
        document_length: Mean tokens per document.
        tokens: Tokens of all data, which may be too small to fill the open shards.
    """
    data, shape, dims = recipe.data, layout.shape, layout.dims
    devices = min(dims.world_size, DEVICES)
    patches = vision_share * shape.patch
    # Processes of a tensor-parallel group read the same data, each for itself.
    streams = devices * recipe.streams / dims.dp
    opened = streams * len(data.sources) * open_bytes(recipe.streams, len(data.sources))
    waiting_token = _WAITING_TOKEN + _COMPRESSED * patches
    packers = len(data.sources) if data.weight_by == "sequences" else 1
    waiting = packers * data.packing_buffer * min(document_length, data.sequence_length)
    ready = max(data.workers, 1) * data.threads + _PREFETCHED * data.workers
    memory = memory_per_device(layout, recipe)
    trained = min(_FLOAT32 * trained_parameters(shape, recipe) / dims.shards, memory.weights)
    staged = devices * (trained + memory.optimizer) if recipe.checkpoint.asynchronous else 0
    return HostMemory(
        processes=devices * (1 + data.workers) * _PROCESS,
        shards=round(min(opened, devices * tokens * waiting_token)),
        packers=round(streams * waiting * waiting_token),
        sequences=round(devices * ready * data.sequence_length * (_TOKEN + patches)),
        staging=round(staged),
        model=_FLOAT32 * shape.parameters.total,
    )
