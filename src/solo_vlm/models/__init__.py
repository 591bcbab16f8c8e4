"""SOLO models: creation from an LLM, loading, saving, counting, inspection; `solo` is the model itself.

This module registers SOLO with transformers' Auto classes at the moment transformers loads them.

May import: utils.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import wrapt

_AUTO = "transformers.models.auto"
_MODEL = "solo_vlm.models.solo"


def register_when_loaded() -> None:
    """Register SOLO with every Auto class once it is loaded, without importing transformers or torch now.

    Whichever module is loaded first, the Auto class's or ours, loads the other.
    """
    _when_both_loaded("configuration_auto", "configuration_solo", _register_config)
    _when_both_loaded("modeling_auto", "modeling_solo", _register_models)
    _when_both_loaded("image_processing_auto", "image_processing_solo", _register_image_processor)
    _when_both_loaded("processing_auto", "processing_solo", _register_processor)


def _when_both_loaded(auto: str, ours: str, register: Callable[[ModuleType, ModuleType], None]) -> None:
    def auto_loaded(_: ModuleType) -> None:
        # If ours is being imported, this import is what loaded the Auto class; its own hook comes next.
        if f"{_MODEL}.{ours}" not in sys.modules:
            import_module(f"{_MODEL}.{ours}")

    def ours_loaded(module: ModuleType) -> None:
        register(import_module(f"{_AUTO}.{auto}"), module)

    wrapt.register_post_import_hook(auto_loaded, f"{_AUTO}.{auto}")
    wrapt.register_post_import_hook(ours_loaded, f"{_MODEL}.{ours}")


def _register_config(auto: ModuleType, ours: ModuleType) -> None:
    auto.AutoConfig.register(ours.SoloConfig.model_type, ours.SoloConfig, exist_ok=True)


def _register_models(auto: ModuleType, ours: ModuleType) -> None:
    auto.AutoModel.register(ours.SoloConfig, ours.SoloModel, exist_ok=True)
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        if auto_class := getattr(auto, name, None):
            auto_class.register(ours.SoloConfig, ours.SoloForConditionalGeneration, exist_ok=True)


def _register_image_processor(auto: ModuleType, ours: ModuleType) -> None:
    from solo_vlm.models.solo.configuration_solo import SoloConfig

    classes = {"pil": ours.SoloImageProcessor}
    auto.AutoImageProcessor.register(SoloConfig, image_processor_classes=classes, exist_ok=True)


def _register_processor(auto: ModuleType, ours: ModuleType) -> None:
    from solo_vlm.models.solo.configuration_solo import SoloConfig

    auto.AutoProcessor.register(SoloConfig, ours.SoloProcessor, exist_ok=True)
