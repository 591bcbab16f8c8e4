"""Experiments with many runs: the launcher, scaling sweeps and laws, ablations.

May import: data, evaluate, generate, models, quickstart, train, utils.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solo_vlm.experiments.scaling.laws import ScalingFit, ScalingLaw, fit_scaling_law

__all__ = ["ScalingFit", "ScalingLaw", "fit_scaling_law"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("solo_vlm.experiments.scaling.laws"), name)
