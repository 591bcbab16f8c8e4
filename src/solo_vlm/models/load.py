"""Loading of SOLO models and processors from a folder or the hub, with quantization, and saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from solo_vlm.models.checks import (
    check_files,
    check_generation,
    check_image_attention,
    check_loaded,
    check_tokenizer,
    check_vocabulary,
    check_weights,
    first_reason,
)
from solo_vlm.models.original import (
    has_tokenizer,
    original_generation_config,
    original_processor,
    original_tokenizer,
    tokenizer_vision_ids,
)
from solo_vlm.models.packed.kernels import compute_without_kernels_on_cpu
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import ROUTER_BIASES, SoloForConditionalGeneration
from solo_vlm.models.solo.original_solo import is_original
from solo_vlm.models.solo.processing_solo import SoloProcessor
from solo_vlm.models.stops import complete_generation, stop_ids
from solo_vlm.utils.errors import SoloError, first_line

PATCH_EMBEDDING = "embed_vision_patch"
HEAD = "lm_head"

Quantization = Literal["int8", "nf4"]


def model_without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the LLM of a SOLO model's or an LLM's configuration on the meta device."""
    text_config = copy.deepcopy(config.get_text_config(decoder=True))  # which the model may change
    # Initialization must not advance the random state of a run.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(text_config)
    return model


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the maximum length of a sequence, or None if the configuration names none, as Mamba's."""
    text_config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")  # the latter: MPT
    return next((getattr(text_config, name) for name in names if hasattr(text_config, name)), None)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers in order; none if they are not a list of modules.

    A layer inside another one (a Mamba layer in a hybrid layer of Zamba) is a part of it.
    """
    for decoder in (model.get_decoder(), model):  # ModernBERT's head is called its decoder
        layers: list[nn.Module] = []
        inside: set[nn.Module] = set()
        for module in decoder.modules():
            if isinstance(module, GradientCheckpointingLayer) and module not in inside:
                layers.append(module)
                inside.update(module.modules())
        if layers:
            return layers
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((layers for layers in lists if len(layers) == count), [])


def load_model(
    path: str | Path, dtype: str = "auto", device: str | None = None, quantization_config: Any = None
) -> SoloForConditionalGeneration:
    """Load a SOLO model in evaluation mode.

    Args:
        path: Folder or hub ID; an original checkpoint works too.
        dtype: "auto" (as stored) or the name of a torch dtype.
        device: Device of the model. Default: the accelerator if there is one.
        quantization_config: Configuration of transformers for quantizing the weights while they are read.

    Raises:
        SoloError: The path is not readable or not a SOLO model, its decoder cannot follow its settings of
            images, or it cannot be put on the device.
    """
    settings = _read_settings(path)
    if settings and not _is_solo(settings):  # transformers would load it as a SOLO-7B with random weights
        kind = settings.get("model_type")
        raise SoloError(
            f"{path} is not a SOLO model but {kind or 'has no model_type'}: "
            f"solo init --llm {path} makes one from an LLM"
        )
    check_weights(path, lambda: SoloForConditionalGeneration(SoloConfig.from_pretrained(str(path))))
    model, info = _load(
        SoloForConditionalGeneration,
        path,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        quantization_config=quantization_config,
        output_loading_info=True,
    )
    check_loaded(path, model, info)
    compute_without_kernels_on_cpu(model)
    if is_original(settings):
        _use_original_vocabulary(model, path)
    check_generation(path, model.generation_config, model.config.text_config.vocab_size)
    where = device or _default_device()
    try:
        model = model.to(where).eval()
    except (AssertionError, RuntimeError) as error:  # no such device, or out of memory
        raise SoloError(f"cannot put the model on {where}: {first_line(error)}") from error
    check_image_attention(model)
    return model


def load_processor(path: str | Path) -> SoloProcessor:
    """Load the processor of a SOLO model; an original checkpoint's uses the original image layout.

    Raises:
        SoloError: The path is not readable.
    """
    settings = _read_settings(path)
    check_tokenizer(path)
    if is_original(settings):
        tokenizer = original_tokenizer(path, rows=settings["vocab_size"])
        return original_processor(tokenizer, settings.get("vision_patch_size", 32), layout="original")
    return _load(SoloProcessor, path)


def is_solo(path: str | Path) -> bool:
    """Return whether a folder or hub ID contains a SOLO model or an original checkpoint.

    Args:
        path: Folder or hub ID; a `Path` is never a hub ID.

    Raises:
        SoloError: The path is not readable.
    """
    if isinstance(path, Path) and not path.exists():
        raise SoloError(f"no model at {path}")
    check_files(path)
    try:
        settings = PreTrainedConfig.get_config_dict(str(path))[0]
    except (OSError, ValueError) as error:
        raise SoloError(f"cannot read a model from {path}: {first_reason(path, error)}") from error
    return _is_solo(settings)


def load_config(path: str | Path) -> PreTrainedConfig:
    """Load the configuration of a SOLO model or a plain LLM.

    Args:
        path: Folder, hub ID, or a file in the format of `config.json`.

    Raises:
        SoloError: The path is not readable.
    """
    kind = SoloConfig if is_solo(path) else AutoConfig
    try:
        return kind.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # model families raise any type on odd settings
        raise SoloError(f"cannot read a model from {path}: {first_reason(path, error)}") from error


def load_tokenizer(path: str | Path, **options: Any) -> Any:
    """Load a tokenizer without running code of its folder.

    Args:
        path: Folder or hub ID.
        **options: Options of `AutoTokenizer.from_pretrained`.

    Raises:
        SoloError: The folder has no readable tokenizer.
    """
    if Path(path).is_file():
        raise SoloError(f"{path} is a file: give the folder that it is in")
    check_files(path)
    check_tokenizer(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **options)
    except Exception as error:  # tokenizers raises any type on a broken file
        raise SoloError(f"cannot read a tokenizer from {path}: {first_reason(path, error)}") from error
    check_vocabulary(path, tokenizer)
    return tokenizer


def load_llm(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a causal language model that is not a SOLO model without running code of its folder.

    Of a multimodal model that transformers loads as one, this is the text model.

    Args:
        path: Folder or hub ID.
        **options: Options of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        SoloError: The folder cannot be read as a language model, or its weights do not fit its configuration.
    """
    check_files(path)
    kind: Any = AutoModelForCausalLM
    left_out: set[str] = set()
    if "gguf_file" not in options:
        config = load_config(path)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise SoloError(
                f"{path} is a {config.model_type} model, which is no causal language model of transformers: "
                "choose an LLM"
            )
        check_weights(path, lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        kind, left_out = _causal_lm_class(config), _other_parts(config)
    try:
        model, info = kind.from_pretrained(
            str(path), trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises any type on a broken file
        raise SoloError(f"cannot read a language model from {path}: {first_reason(path, error)}") from error
    if kind is not AutoModelForCausalLM:
        model.__class__ = kind.__base__
    check_loaded(path, model, info, left_out)
    compute_without_kernels_on_cpu(model)
    return model


def _causal_lm_class(config: PreTrainedConfig) -> Any:
    """Return a class that loads an LLM with float32 biases of its routers, as SOLO models have them."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config):  # a part of a multimodal model
        return AutoModelForCausalLM
    kept = {*(kind._keep_in_fp32_modules_strict or ()), *ROUTER_BIASES}
    return type(kind.__name__, (kind,), {"_keep_in_fp32_modules_strict": kept, "__module__": kind.__module__})


def _other_parts(config: PreTrainedConfig) -> set[str]:
    """Return the names of the parts of a multimodal model besides its text model, such as vision_model."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return set()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    text = {model.get_decoder(), model.get_output_embeddings()}
    parts = [*model.named_children(), *model.base_model.named_children()]
    return {name for name, part in parts if text.isdisjoint(part.modules())}


def _use_original_vocabulary(model: SoloForConditionalGeneration, path: str | Path) -> None:
    """Set the vision IDs of the tokenizer, if there is one, and suppress those tokens in generation."""
    if not Path(path).is_dir() or has_tokenizer(Path(path)):
        tokenizer = original_tokenizer(path, rows=model.config.text_config.vocab_size)
        for name, token_id in tokenizer_vision_ids(tokenizer).items():
            setattr(model.config, name, token_id)
    model.generation_config = original_generation_config(model.config)


def _read_settings(path: str | Path) -> dict[str, Any]:
    """Check a folder and read its `config.json`; a folder without one has no settings: `_load` reports it."""
    check_files(path)
    try:
        return PreTrainedConfig.get_config_dict(str(path))[0]
    except (OSError, ValueError) as error:
        if Path(path).exists():
            return {}
        # Here, because the hub would be asked, and waited for, again.
        raise SoloError(f"cannot load {path}: {first_reason(path, error)}") from error


def _is_solo(settings: dict[str, Any]) -> bool:
    return settings.get("model_type") == SoloConfig.model_type or is_original(settings)


def _load(cls: Any, path: str | Path, **options: Any) -> Any:
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise SoloError(f"{path} is not a model folder: it has no config.json")
    try:
        return cls.from_pretrained(str(path), **options)
    except Exception as error:  # transformers raises any type on a broken file
        raise SoloError(f"cannot load {path}: {first_reason(path, error)}") from error


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def quantization_config(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration that quantizes the decoder's linear layers with bitsandbytes.

    The head and the patch embedding, the model's only visual input, keep their precision.

    Args:
        kind: "int8" (LLM.int8: Dettmers et al. 2022), or "nf4" for 4-bit NormalFloat with double quantization
            (QLoRA: Dettmers et al. 2023, section 3).
        dtype: Compute dtype of "nf4"; int8 has its own arithmetic.

    Raises:
        SoloError: bitsandbytes or accelerate is not installed, or `kind` is unknown.
    """
    from transformers.utils import is_accelerate_available, is_bitsandbytes_available

    if not (is_bitsandbytes_available() and is_accelerate_available()):
        raise SoloError("quantize needs bitsandbytes: pip install 'solo-vlm[quantize]'")
    untouched = [PATCH_EMBEDDING, HEAD]
    match kind:
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=untouched)
        case "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=untouched,
            )
        case _:
            raise SoloError(f"quantize must be int8 or nf4, not {kind}")


def save_model(folder: Path, model: PreTrainedModel, processor: Any, **options: Any) -> None:
    """Save a model with its processor, or an LLM with its tokenizer, for generation in any software.

    The saved tokenizer pads on the left, and the saved generation config stops where the chat template ends a
    turn, or where an LLM's documents end.

    Args:
        folder: Existing folder.
        model: SOLO model or plain LLM.
        processor: Processor of the SOLO model, or tokenizer of the LLM.
        **options: Options of `PreTrainedModel.save_pretrained`.
    """
    settings = model.generation_config
    if isinstance(processor, SoloProcessor):
        complete_generation(settings, model.config, processor)
    elif processor.eos_token_id not in (ends := stop_ids(settings)):
        settings.eos_token_id = [*ends, processor.eos_token_id]
    pad_left(getattr(processor, "tokenizer", processor))
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)


def pad_left(tokenizer: Any) -> None:
    """Make a tokenizer pad on the left, also after saving and loading (which keep `init_kwargs`)."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
