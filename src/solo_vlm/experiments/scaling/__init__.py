"""How cost and quality grow with size: FLOPs of SOLO and of LLaVA, sweeps, scaling laws and their plots."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solo_vlm.experiments.scaling.laws import ScalingFit, ScalingLaw, fit_scaling_law

_LAZY = dict.fromkeys(("ScalingFit", "ScalingLaw", "fit_scaling_law"), "solo_vlm.experiments.scaling.laws")

__all__ = ["ScalingFit", "ScalingLaw", "fit_scaling_law"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
