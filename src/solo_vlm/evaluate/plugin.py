"""Tells lmms-eval of the model `solo`: the entry point in its group `lmms_eval.models`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval calls when it collects its models; it imports a model only when that is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="solo", chat_class_path="solo_vlm.evaluate.adapter.Solo")
