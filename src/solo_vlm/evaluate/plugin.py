"""Entry point for lmms-eval, loaded during the import of `lmms_eval.models`, before the adapter can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Register the model `solo`; lmms-eval imports its class when it is used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="solo", chat_class_path="solo_vlm.evaluate.lmms_eval.Solo")
