"""Registers SOLO with transformers' Auto classes, each at the moment transformers loads it."""

from __future__ import annotations

from types import ModuleType

import wrapt


def register_when_loaded() -> None:
    """Arrange for every Auto class to know SOLO, without importing transformers or torch now."""
    package = "transformers.models.auto"
    wrapt.register_post_import_hook(_register_config, f"{package}.configuration_auto")
    wrapt.register_post_import_hook(_register_models, f"{package}.modeling_auto")
    wrapt.register_post_import_hook(_register_image_processor, f"{package}.image_processing_auto")
    wrapt.register_post_import_hook(_register_processor, f"{package}.processing_auto")


def _register_config(auto: ModuleType) -> None:
    from solo_vlm.model.configuration_solo import SoloConfig

    auto.AutoConfig.register(SoloConfig.model_type, SoloConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from solo_vlm.model.configuration_solo import SoloConfig
    from solo_vlm.model.modeling_solo import SoloForConditionalGeneration, SoloModel

    auto.AutoModel.register(SoloConfig, SoloModel, exist_ok=True)
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        if auto_class := getattr(auto, name, None):
            auto_class.register(SoloConfig, SoloForConditionalGeneration, exist_ok=True)


def _register_image_processor(auto: ModuleType) -> None:
    from solo_vlm.model.configuration_solo import SoloConfig
    from solo_vlm.model.image_processing_solo import SoloImageProcessor

    auto.AutoImageProcessor.register(
        SoloConfig, image_processor_classes={"pil": SoloImageProcessor}, exist_ok=True
    )


def _register_processor(auto: ModuleType) -> None:
    from solo_vlm.model.configuration_solo import SoloConfig
    from solo_vlm.model.processing_solo import SoloProcessor

    auto.AutoProcessor.register(SoloConfig, SoloProcessor, exist_ok=True)
