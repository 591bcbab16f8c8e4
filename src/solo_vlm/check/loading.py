"""Loading of any model that can be checked: SOLO models, LLMs, other image-text models, configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from solo_vlm.check.probe import TOLERANCES, Probe
from solo_vlm.check.tiny import tiny_llm
from solo_vlm.data.encode import Encoder, load_encoder
from solo_vlm.models.checks import check_files, check_loaded, check_tokenizer, first_reason
from solo_vlm.models.load import is_solo, load_config, load_llm, load_model
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.utils.errors import SoloError, first_line

_MAX_RANDOM_PARAMETERS = 3 * 10**8


def load_probe(path: str, llm: str | None = None, dtype: str = "float32") -> Probe:
    """Load a model for its certificate, on the CPU.

    Args:
        path: Folder or hub ID of a SOLO model, an LLM or another image-text model, or a `config.json`, whose
            architecture is checked with random weights.
        llm: Folder or hub ID of the LLM that a SOLO model was made of.
        dtype: Name of the torch dtype to compute in.

    Raises:
        SoloError: The model or the LLM cannot be loaded.
    """
    tolerance = TOLERANCES[getattr(torch, dtype)]
    if Path(path).is_file():
        model, weights = _random_model(load_config(path))
        return Probe(model, tolerance=tolerance, weights=weights)
    original = load_llm(llm, dtype=getattr(torch, dtype)).eval() if llm else None
    if is_solo(path):
        model = load_model(path, dtype, "cpu")
        return Probe(model, load_encoder(path), original, tolerance=tolerance)
    config = load_config(path)
    if _is_image_text(config):
        model, processor = _load_image_text(path, dtype)
        return Probe(model, processor=processor, tolerance=tolerance)
    model = load_llm(path, dtype=getattr(torch, dtype)).eval()
    return Probe(model, _text_encoder(path), original, tolerance=tolerance)


def _is_image_text(config: PreTrainedConfig) -> bool:
    has_images = config.get_text_config() is not config
    return has_images and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _load_image_text(path: str, dtype: str) -> tuple[PreTrainedModel, Any]:
    """Load another image-text model, and its processor where it has one."""
    check_files(path)
    check_tokenizer(path)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, trust_remote_code=False, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except Exception as error:  # transformers raises any type on a broken file
        raise SoloError(f"cannot read a model from {path}: {first_reason(path, error)}") from error
    check_loaded(path, model, info)
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception:  # of any type; without it, only text is checked
        processor = None
    return model.eval(), processor


def _text_encoder(path: str) -> Encoder | None:
    """Return the encoder of an LLM; None without a tokenizer, as in folders of weights only."""
    try:
        return load_encoder(path)
    except SoloError:
        return None


def _random_model(config: PreTrainedConfig) -> tuple[PreTrainedModel, str]:
    """Make a model with random weights; one that is too large for seconds gets its family's tiny sizes.

    Returns:
        The model, and what its weights are.
    """
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in _from_config(config).parameters())
        if size > _MAX_RANDOM_PARAMETERS:
            return tiny_llm(config.get_text_config().model_type), "a tiny one of its family, random weights"
        torch.manual_seed(0)
        return _from_config(config).float().eval(), "random weights"
    except Exception as error:  # model families raise any type on odd settings
        raise SoloError(f"cannot make a {config.model_type}: {first_line(error)}") from error


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    if config.model_type == "solo":
        return SoloForConditionalGeneration(config)
    if _is_image_text(config):
        return AutoModelForImageTextToText.from_config(config)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SoloError(f"{config.model_type} is neither a causal language model nor an image-text model")
    return AutoModelForCausalLM.from_config(config)
