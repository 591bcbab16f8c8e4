"""Collectives of a step, and how long a network takes for them.

Bytes follow from what FSDP and tensor parallelism send; `tests/train/estimate/test_communication.py` counts
them. Time is bytes over published bandwidth, of which NCCL's rings reach about 80% for large messages
(NVIDIA's nccl-tests report 230 to 240 of 300 GB/s on eight A100).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

from solo_vlm.models.flops import Flops
from solo_vlm.train.estimate.layout import Layout, layer_weights, outside_weights
from solo_vlm.train.estimate.memory import compute_bytes, trained_parameters
from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.train.parallel.sharding import layers_per_fsdp_unit
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError

_EFFICIENCY = 0.8
_FLOAT32 = 4  # bytes
_GIGA = 1e9
_BACKWARD = 2 / 3  # share of the backward pass in computation

# Bytes per second and direction between two devices of a machine. Sources: NVIDIA's data sheets of A100 and
# H100 (NVLink 600 and 900 GB/s, both directions together); PCI Express 4.0 and 5.0, x16.
_INSIDE = {"nvlink3": 300e9, "nvlink4": 450e9, "pcie4": 32e9, "pcie5": 64e9}
_NVLINK = {"A100-40GB": "nvlink3", "A100-80GB": "nvlink3", "H100": "nvlink4", "H200": "nvlink4"}
_NETWORK = re.compile(r"(nvlink|nvlink3|nvlink4|pcie4|pcie5)(?:\+([1-9]\d*)g)?", re.IGNORECASE)


@dataclass(frozen=True)
class Network:
    """Bandwidth of a device, in bytes per second and direction.

    Attributes:
        inside: Bandwidth to the other devices of its machine.
        between: Bandwidth to other machines; None: a single machine.
        devices: Devices per machine.
    """

    name: str
    inside: float
    between: float | None = None
    devices: int = 8

    @classmethod
    def parse(cls, name: str, device: str) -> Self:
        """Read a name such as nvlink+400g: NVLink within machines, 400 Gbit/s per device between them.

        Args:
            device: Name of the device, which decides the generation of NVLink.
        """
        match = _NETWORK.fullmatch(name)
        if not match:
            raise SoloError(
                f"unknown network {name}: give the link within a machine (nvlink, {', '.join(_INSIDE)}), and "
                "for several machines the Gbit/s per device between them, such as nvlink+400g"
            )
        link, rate = match[1].lower(), match[2]
        if link == "nvlink" and device not in _NVLINK:
            raise SoloError(
                f"network {name}: NVLink does not connect eight {device}; give pcie4 or pcie5 in its place"
            )
        inside = _INSIDE[_NVLINK[device] if link == "nvlink" else link]
        return cls(name, inside, float(rate) * _GIGA / 8 if rate else None)

    def crosses_machines(self, span: int, world_size: int) -> bool:
        """Return whether one of the groups of `span` consecutive devices is on several machines."""
        return world_size > self.devices and self.devices % span > 0

    def bandwidth(self, stride: int, size: int, world_size: int) -> float:
        """Return the bandwidth of the slowest ring of `size` devices that are `stride` apart.

        Raises:
            SoloError: It spans several machines, and the network has no rate between them.
        """
        if not self.crosses_machines(stride * size, world_size):
            return _EFFICIENCY * self.inside
        if self.between is None:
            raise SoloError(
                f"network {self.name}: {world_size} devices need several machines of {self.devices}; add "
                "the Gbit/s per device between them, such as nvlink+400g"
            )
        return _EFFICIENCY * min(self.inside, self.between)


@dataclass(frozen=True)
class Collective:
    """All collectives of one purpose in a step.

    Attributes:
        payload: Bytes of the whole tensors; of an all-to-all, of what one process has.
        stride: Distance between the ranks of the group.
        world_size: Processes of the run.
        overlaps: Whether computation can go on meanwhile.
        once: Whether it only runs in the backward pass of the step's last sequence.
    """

    purpose: str
    kind: Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
    payload: float
    size: int
    stride: int
    world_size: int
    overlaps: bool
    once: bool = False

    @property
    def sent(self) -> float:
        """Bytes that each process sends in a ring."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.payload * (self.size - 1) / self.size

    def seconds(self, network: Network) -> float:
        """Return the seconds that it takes alone."""
        return self.sent / network.bandwidth(self.stride, self.size, self.world_size)


def collectives(layout: Layout, recipe: Recipe) -> list[Collective]:
    """Return the collectives of a step; those of metrics and norms are too small to count."""
    own, dims = layout.own, layout.dims
    compute, steps, tp = compute_bytes(recipe), dims.gradient_accumulation_steps, dims.tp
    layers = own.layers * layer_weights(own)
    outside = outside_weights(own)
    is_partial = recipe.lora is not None or recipe.trainable != "all"
    trained = trained_parameters(layout.shape, recipe) if is_partial else layers + outside
    if recipe.lora or recipe.trainable == "new_tokens":  # adapters, and a trained copy of the patch embedding
        layers += trained - own.parameters.patch_embedding
        outside += own.parameters.patch_embedding
    gathers = 2 if recipe.parallel.reshard else 1
    reductions = 1 if recipe.parallel.defer_reduction else steps
    shards, copies = dims.shards, dims.replicate
    collective = partial(Collective, world_size=dims.world_size)
    found = [
        collective(
            "weights",
            "all-gather",
            steps * compute * (gathers * layers + outside),
            shards,
            tp,
            overlaps=True,
        ),
        collective(
            "gradients",
            "reduce-scatter",
            reductions * _FLOAT32 * trained,
            shards,
            tp,
            overlaps=True,
            once=recipe.parallel.defer_reduction,
        ),
        collective(
            "copies of gradients",
            "all-reduce",
            _FLOAT32 * trained / shards,
            copies,
            tp * shards,
            overlaps=True,
            once=True,
        ),
    ]
    passes = 2 + layout.modes.recomputed
    keys = own.key * math.lcm(own.key_heads or 1, dims.cp) / (own.key_heads or 1)
    states = (recipe.data.sequence_length / dims.cp) * 2 * (own.query + keys) * compute
    exchanged = steps * own.layers * passes * states
    found.append(collective("slices for heads", "all-to-all", exchanged, dims.cp, tp, overlaps=False))
    if tp > 1:
        tokens = layout.tokens
        hidden, gathered = (
            steps * tokens * compute * _exchanged(layout, kind) for kind in ("all-reduce", "all-gather")
        )
        is_split = own.vocabulary < layout.shape.vocabulary
        # Of every token: the gradient of its state; twice, the largest logit, and the logits' sum and target.
        loss = is_split * steps * tokens * (compute * own.hidden + 2 * 3 * _FLOAT32)
        replicated = _FLOAT32 * (trained if is_partial else layout.replicated) / shards
        found += [
            collective("hidden states", "all-reduce", hidden, tp, 1, overlaps=False),
            collective("split features", "all-gather", gathered, tp, 1, overlaps=False),
            collective("loss", "all-reduce", loss, tp, 1, overlaps=False),
            collective("replicated gradients", "all-reduce", replicated, tp, 1, overlaps=False),
        ]
    return [each for each in found if each.size > 1 and each.payload]


def crossing_groups(dims: ParallelDims, network: Network) -> str | None:
    """Return a warning if processes that exchange hidden states are not on one machine."""
    sizes = {"parallel.tensor": dims.tp, "parallel.context x parallel.tensor": dims.cp * dims.tp}
    for setting, span in sizes.items():
        if network.between and network.crosses_machines(span, dims.world_size):
            return (
                f"groups of {setting} = {span} cross machines of {network.devices} devices: hidden states "
                f"travel at {network.between / _GIGA:.3g} GB/s, not {network.inside / _GIGA:.3g}; choose a "
                f"divisor of {network.devices}"
            )
    return None


def _exchanged(layout: Layout, kind: str) -> float:
    """Return the values per token that processes exchange for split layers, forward and backward."""
    again, shape = layout.modes.recomputed, layout.shape
    # Recomputation stops before the last exchange of a layer, unless a norm follows, which saves its result.
    ends_in_norm = not shape.last_flops and shape.active_parameters == shape.parameters.total
    return sum(
        each.backward + each.forward * (1 + again * (ends_in_norm or not each.is_last))
        for each in layout.exchanges
        if each.kind == kind
    )


@dataclass(frozen=True)
class Speed:
    """Expected speed of a step.

    Attributes:
        compute: Seconds of computation.
        exposed: Seconds of communication that computation does not hide.
        mfu: Model FLOPs utilization of both.
    """

    compute: float
    exposed: float
    mfu: float


# Share of the peak that parts of a step reach, at worst and at best, with all that is computed around their
# products: layers as measured on one H100 (docs/performance.md), compiled or not; attention and loss assumed
# after Dao 2023, "FlashAttention-2", and Shah et al. 2024, "FlashAttention-3".
EFFICIENCIES = {
    ("layers", True): (0.48, 0.62),
    ("layers", False): (0.38, 0.48),
    ("attention", True): (0.35, 0.6),
    ("attention", False): (0.35, 0.6),
    ("head and loss", True): (0.35, 0.55),
    ("head and loss", False): (0.35, 0.55),
}


def expected_speeds(
    forward: Flops, model_flops: int, layout: Layout, recipe: Recipe, peak: float, network: Network
) -> tuple[Speed, Speed]:
    """Return the worst and the best expected speed of a step.

    Args:
        forward: FLOPs of the global batch's forward pass in one of the processes that split layers.
        model_flops: FLOPs of the step by which MFU is defined.
        peak: FLOPs per second of a device.
    """
    found, processes = [], layout.dims.world_size
    parts = forward.hardware_parts(layout.modes.recomputed, recipe.is_decoder_frozen)
    for end in (0, 1):
        seconds = sum(
            flops / (processes / layout.dims.tp * peak * EFFICIENCIES[part, recipe.compile][end])
            for part, flops in parts.items()
        )
        exposed = exposed_seconds(collectives(layout, recipe), layout, seconds, network)
        found.append(Speed(seconds, exposed, model_flops / (processes * peak * (seconds + exposed))))
    return found[0], found[1]


def exposed_seconds(found: Sequence[Collective], layout: Layout, compute: float, network: Network) -> float:
    """Return the seconds of communication that computation does not hide.

    Weights are gathered one FSDP unit ahead, and gradients reduced behind the next unit's backward pass. So
    what exceeds computation is exposed, and the first gather and the last reduction of each sequence. What
    runs once has only the last backward pass to hide behind.
    """
    layers = layout.shape.layers
    units = -(-layers // layers_per_fsdp_unit(layers, round(layer_weights(layout.shape))))

    def seconds(overlaps: bool, once: bool = False) -> float:
        chosen = (each for each in found if (each.overlaps, each.once) == (overlaps, once))
        return sum(collective.seconds(network) for collective in chosen)

    def exposed(hidden: float, behind: float) -> float:
        return min(hidden, max(hidden - behind, hidden / (units + 1)))

    steady = seconds(overlaps=True)
    last_backward = _BACKWARD * max(compute - steady, 0.0) / layout.dims.gradient_accumulation_steps
    return seconds(overlaps=False) + exposed(steady, compute) + exposed(seconds(True, True), last_backward)
