"""Load a SOLO model or its processor from a folder or the hub, with errors that a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from solo_vlm.errors import SoloError
from solo_vlm.model.modeling_solo import SoloForConditionalGeneration
from solo_vlm.model.processing_solo import SoloProcessor


def load_model(
    path: str | Path, dtype: str = "auto", device: str | None = None
) -> SoloForConditionalGeneration:
    """A SOLO model in evaluation mode.

    Args:
        path: folder or hub id.
        dtype: "auto" (as stored) or a torch dtype's name.
        device: default: the accelerator if there is one.

    Raises:
        SoloError: nothing readable is there, or it is no SOLO model.
    """
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = _load(SoloForConditionalGeneration, path, dtype=kind)
    return model.to(device or _default_device()).eval()


def load_processor(path: str | Path) -> SoloProcessor:
    """The processor that belongs to a SOLO model.

    Raises:
        SoloError: nothing readable is there.
    """
    return _load(SoloProcessor, path)


def _load(cls: Any, path: str | Path, **options: Any) -> Any:
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise SoloError(f"{path} is not a model folder: it has no config.json")
    try:
        return cls.from_pretrained(str(path), **options)
    except Exception as error:  # transformers raises whatever the broken file makes it stumble over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SoloError(f"cannot load {path}: {reason}") from error


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"
