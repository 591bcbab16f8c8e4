"""Single-transformer vision-language models: one decoder, raw image patches, no vision encoder.

Importing this package is fast: torch and transformers are loaded only when a name is used. transformers' Auto
classes know SOLO as soon as they are loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from solo_vlm.models import register_when_loaded

if TYPE_CHECKING:
    from solo_vlm.models.solo.configuration_solo import SoloConfig
    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
    from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration, SoloModel
    from solo_vlm.models.solo.processing_solo import SoloProcessor

__version__ = "0.1.0"

_LAZY = {
    "SoloConfig": "solo_vlm.models.solo.configuration_solo",
    "SoloModel": "solo_vlm.models.solo.modeling_solo",
    "SoloForConditionalGeneration": "solo_vlm.models.solo.modeling_solo",
    "SoloImageProcessor": "solo_vlm.models.solo.image_processing_solo",
    "SoloProcessor": "solo_vlm.models.solo.processing_solo",
}

__all__ = [
    "SoloConfig",
    "SoloForConditionalGeneration",
    "SoloImageProcessor",
    "SoloModel",
    "SoloProcessor",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_loaded()
