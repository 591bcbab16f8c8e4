"""Load a SOLO model or its processor from a folder or the hub, with errors that a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from solo_vlm.models.original import (
    has_tokenizer,
    original_generation_config,
    original_processor,
    original_tokenizer,
    tokenizer_vision_ids,
)
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.models.solo.original_solo import is_original
from solo_vlm.models.solo.processing_solo import SoloProcessor
from solo_vlm.utils.errors import SoloError


def load_model(
    path: str | Path, dtype: str = "auto", device: str | None = None, quantization_config: Any = None
) -> SoloForConditionalGeneration:
    """A SOLO model in evaluation mode.

    Args:
        path: folder or hub id; one of the release is read as it is.
        dtype: "auto" (as stored) or a torch dtype's name.
        device: default: the accelerator if there is one.
        quantization_config: transformers' own, for weights that are quantised while they are read.

    Raises:
        SoloError: nothing readable is there, it is no SOLO model, or it cannot be put on the device.
    """
    _refuse_others(path)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = _load(SoloForConditionalGeneration, path, dtype=kind, quantization_config=quantization_config)
    if _original_settings(path):
        _use_original_vocabulary(model, path)
    where = device or _default_device()
    try:
        return model.to(where).eval()
    except (AssertionError, RuntimeError) as error:  # torch's own: no such device, or not enough memory
        raise SoloError(f"cannot put the model on {where}: {str(error).splitlines()[0]}") from error


def load_processor(path: str | Path) -> SoloProcessor:
    """The processor that belongs to a SOLO model; for the release's own folder, one in its layout.

    Raises:
        SoloError: nothing readable is there.
    """
    if settings := _original_settings(path):
        tokenizer = original_tokenizer(path, rows=settings["vocab_size"])
        return original_processor(tokenizer, settings.get("vision_patch_size", 32), layout="original")
    return _load(SoloProcessor, path)


def is_solo(path: str | Path) -> bool:
    """Whether a folder or hub id holds a SOLO model, this project's or the release's. A Path is no hub id.

    Raises:
        SoloError: nothing readable is there.
    """
    if isinstance(path, Path) and not path.exists():
        raise SoloError(f"no model at {path}")
    try:
        settings = PreTrainedConfig.get_config_dict(str(path))[0]
    except (OSError, ValueError) as error:
        raise SoloError(f"cannot read a model from {path}: {str(error).splitlines()[0]}") from error
    return settings.get("model_type") == SoloConfig.model_type or is_original(settings)


def load_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a SOLO model or of a plain LLM.

    Args:
        path: folder, hub id, or a file as `config.json` is.

    Raises:
        SoloError: nothing readable is there.
    """
    kind = SoloConfig if is_solo(path) else AutoConfig
    try:
        return kind.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise SoloError(f"cannot read a model from {path}: {str(error).splitlines()[0]}") from error


def _use_original_vocabulary(model: SoloForConditionalGeneration, path: str | Path) -> None:
    """Vision ids as the tokenizer, if there is one, has them, and generation without those tokens."""
    if not Path(path).is_dir() or has_tokenizer(Path(path)):
        tokenizer = original_tokenizer(path, rows=model.config.text_config.vocab_size)
        for name, token_id in tokenizer_vision_ids(tokenizer).items():
            setattr(model.config, name, token_id)
    model.generation_config = original_generation_config(model.config)


def _original_settings(path: str | Path) -> dict[str, Any] | None:
    """The `config.json` of a folder of the release; None for any other."""
    try:
        settings = PreTrainedConfig.get_config_dict(str(path))[0]
    except (OSError, ValueError):  # the loaders say what is wrong with it
        return None
    return settings if is_original(settings) else None


def _refuse_others(path: str | Path) -> None:
    """Refuse any other model: transformers would make a SOLO-7B of random weights of its configuration."""
    try:
        settings = PreTrainedConfig.get_config_dict(str(path))[0]
    except (OSError, ValueError):  # the loaders say what is wrong with it
        return
    kind = settings.get("model_type")
    if settings and kind != SoloConfig.model_type and not is_original(settings):
        raise SoloError(
            f"{path} is no SOLO model, but {kind or 'of no model_type'}: "
            f"solo init --llm {path} makes one of an LLM"
        )


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
