"""Who does what: processes that split a layer, that split the data; accumulation; layers gathered at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError

UNIT = 100_000_000
"""Parameters that are gathered at once, where layers are smaller."""


@dataclass(frozen=True)
class Layout:
    """The processes of a run, as a grid of `data` x `tensor`.

    Attributes:
        data: groups that each read data of their own; the parameters are sharded over them.
        tensor: processes of a group, which split every layer and read the same data.
        accumulation: packed sequences that each group reads, one after the other, for one step.
    """

    data: int
    tensor: int
    accumulation: int

    @property
    def processes(self) -> int:
        """All of them."""
        return self.data * self.tensor


def layout(recipe: Recipe, processes: int) -> Layout:
    """Share a global batch among processes, one packed sequence at a time each.

    Raises:
        SoloError: it cannot be shared evenly; the message says which numbers would work.
    """
    tensor, batch, streams = recipe.parallel.tensor, recipe.global_batch, recipe.data.streams
    if processes % tensor:
        raise SoloError(
            f"{processes} processes do not divide into groups of parallel.tensor = {tensor}: "
            f"start a multiple of {tensor}, or set parallel.tensor to one of {_listed(_divisors(processes))}"
        )
    data = processes // tensor
    if batch % data:
        fewer = [count * tensor for count in _divisors(batch) if count < data]
        raise SoloError(
            f"global_batch = {batch} cannot be shared among {data} data-parallel groups: set it to "
            f"{_listed(_neighbours(batch, data))}, or start {_listed(fewer)} processes"
        )
    readers = data * max(recipe.data.workers, 1)
    if streams % readers:
        raise SoloError(
            f"data.streams = {streams} cannot be shared among {data} data-parallel groups x "
            f"{max(recipe.data.workers, 1)} workers: set it to {_listed(_neighbours(streams, readers))}"
        )
    return Layout(data, tensor, batch // data)


def layers_at_once(layers: int, parameters: int, unit: int = UNIT) -> int:
    """How many layers of a sharded model are gathered, and their gradients summed, together.

    A unit costs Python and the network the same whatever its size: layer by layer, a small model spends a
    good part of a step on that. Large layers are units of their own, so that few of them are whole at a time.

    Args:
        layers: of the model.
        parameters: of one layer.
        unit: parameters that are gathered at once.
    """
    units = min(layers, max(1, math.ceil(layers * parameters / unit)))
    return math.ceil(layers / units)


def _neighbours(number: int, divisor: int) -> list[int]:
    """The multiples of a divisor on both sides of a number."""
    below = number // divisor * divisor
    return [multiple for multiple in (below, below + divisor) if multiple]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int]) -> str:
    *others, last = [str(number) for number in numbers]
    return f"{', '.join(others)} or {last}" if others else last
