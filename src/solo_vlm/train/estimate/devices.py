"""What accelerators can do, as their makers say: memory, and matrix products in bfloat16."""

from __future__ import annotations

import re
from dataclasses import dataclass

from solo_vlm.utils.errors import SoloError

_GIB = 2**30
_TERA = 10**12


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: as in the table.
        memory: bytes.
        peak_flops: FLOPs a second of dense matrix products in bfloat16, summed in float32.
    """

    name: str
    memory: int
    peak_flops: float


def _device(name: str, gibibytes: float, teraflops: float) -> Device:
    return Device(name, round(gibibytes * _GIB), teraflops * _TERA)


# Without sparsity, by which data sheets double the figure. Sources: NVIDIA's data sheets of the A100, H100,
# H200, L4 and L40S; the appendices of its whitepapers on GA102 (RTX 3090), Ada (4090) and RTX Blackwell
# (5090). The L4 and the L40S have 24 and 48 GB, less what error correction takes.
DEVICES = (
    _device("A100-40GB", 40, 312),
    _device("A100-80GB", 80, 312),
    _device("H100", 80, 989.4),
    _device("H100-PCIe", 80, 756),
    _device("H200", 141, 989.4),
    _device("L4", 22.5, 121),
    _device("L40S", 45, 362),
    _device("RTX-3090", 24, 71),
    _device("RTX-4090", 24, 165.2),
    _device("RTX-5090", 32, 209.5),
)


def find_device(name: str) -> Device:
    """A device of the table by its name, whatever its dashes and capitals.

    Raises:
        SoloError: it is not in the table.
    """
    for device in DEVICES:
        if _words(device.name) == _words(name):
            return device
    raise SoloError(f"no device {name}: known are {', '.join(device.name for device in DEVICES)}")


def recognize_device(name: str) -> Device | None:
    """The device that torch calls so, as in "NVIDIA H100 80GB HBM3"; None where it is not in the table."""
    words = _words(name)
    fitting = [device for device in DEVICES if _words(device.name) <= words]
    return max(fitting, key=lambda device: len(device.name), default=None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
