"""Training: recipes, the training loop, parallelism, checkpoints, metrics and estimates.

May import: check, data, evaluate, generate, models, utils.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solo_vlm.train.recipe import Recipe
    from solo_vlm.train.trainer import train

_LAZY = {"Recipe": "solo_vlm.train.recipe", "train": "solo_vlm.train.trainer"}

__all__ = ["Recipe", "train"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
