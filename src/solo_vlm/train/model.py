"""The model to train: weights, trainable parameters, adapters, sharding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from solo_vlm.check.certificate import require_exact_packing, require_exact_slices
from solo_vlm.check.probe import QUANTIZED, TOLERANCES
from solo_vlm.check.tiny import tiny_llm
from solo_vlm.data.encode import load_encoder
from solo_vlm.models.checks import check_processor
from solo_vlm.models.load import (
    HEAD,
    PATCH_EMBEDDING,
    context_length,
    decoder_layers,
    load_config,
    load_llm,
    load_model,
    quantization_config,
)
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.stops import check_stops
from solo_vlm.train.experts import prepare_biases
from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.train.parallel.context_parallel import check_context_parallel, exchange_heads
from solo_vlm.train.parallel.sharding import load_full_state_dict, shard_model
from solo_vlm.train.parallel.tensor_parallel import check_tensor_parallel
from solo_vlm.train.recipe import LoraSettings, Recipe
from solo_vlm.utils.errors import SoloError

_FLOAT8_CAPABILITY = (8, 9)  # CUDA compute capability: Ada, Hopper and later


def load_base_model(path: str | Path, recipe: Recipe | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a SOLO model and its processor, or a plain LLM and its tokenizer.

    Weights are in float32, or in 4 bits if the recipe quantizes them.
    """
    encoder = load_encoder(path)
    options: dict[str, Any] = {"dtype": "float32"}
    if recipe and recipe.quantize:
        compute_dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        options["quantization_config"] = quantization_config(recipe.quantize, compute_dtype)
    if encoder.sees_images:
        # To main memory first: a model that needs several accelerators does not fit into one.
        device = None if "quantization_config" in options else "cpu"
        model = load_model(path, device=device, **options)
        check_processor(model.config, encoder.processor)
        check_stops(path, model.generation_config, encoder.processor)
        return model, encoder.processor
    return load_llm(path, **options), encoder.processor


def make_model(recipe: Recipe, context: DistributedContext) -> tuple[PreTrainedModel, Any]:
    """Load the base model of a recipe, ready to be trained, and its processor; see also `prepare_layers`."""
    if context.mesh is None or recipe.quantize:  # a quantized model trains in a single process
        model, processor = _load_checked(recipe)
        set_trainable(model, recipe, context.dims.world_size)
        if context.mesh is not None:
            model.to(context.device)
        if recipe.float8:
            use_float8(model, context.device)
    else:
        model, processor = _load_sharded(recipe, context)
    isolate_documents(model)
    if context.slices is not None:
        exchange_heads(model, context.slices)
    return model.train(), processor


def set_trainable(model: PreTrainedModel, recipe: Recipe, world_size: int = 1) -> None:
    """Freeze, in place, what the recipe does not train, and add its adapters; outputs do not change.

    Call it before sharding, and before the optimizer collects the parameters that require a gradient.
    """
    if recipe.trainable != "all" and model.config.model_type != "solo":
        raise SoloError(
            f"trainable = {recipe.trainable}: a plain LLM has neither a patch embedding nor vision tokens; "
            "convert it to a SOLO model first (solo init), or set trainable to all"
        )
    if z_loss := getattr(model.config, "z_loss_coefficient", 0):  # Bamba; a SOLO model computes its own loss
        raise SoloError(
            f"z_loss_coefficient = {z_loss}: the z-loss of {model.config.model_type} models in transformers "
            "counts padding; set it to 0 in the model's config.json"
        )
    if recipe.quantize and not recipe.lora:
        raise SoloError("quantize: 4-bit weights cannot be trained directly; also set lora (QLoRA)")
    if recipe.quantize and recipe.float8:
        raise SoloError("quantize: 4-bit weights cannot be used in float8; unset quantize or float8")
    if recipe.quantize and world_size > 1:
        raise SoloError("quantize: 4-bit weights cannot be sharded; start one process, or unset quantize")
    if recipe.lora and recipe.parallel.tensor > 1:
        raise SoloError("lora: adapters do not support tensor parallelism; set parallel.tensor to 1")
    prepare_biases(model, recipe.router_bias_update > 0)
    new_tokens = recipe.trainable == "new_tokens"
    if recipe.lora or new_tokens:
        add_adapters(model, recipe.lora, new_tokens)
    elif recipe.trainable == "patch_embedding":
        model.requires_grad_(False)
        model.get_submodule("model.embed_vision_patch").requires_grad_(True)


def add_adapters(model: PreTrainedModel, lora: LoraSettings | None, new_tokens: bool) -> None:
    """Freeze a model in place and add PEFT adapters; the patch embedding, if any, stays fully trainable.

    Adapters live in the model's own layers (transformers' `add_adapter`), so sharding, checkpoints, attention
    and loss see an ordinary model with fewer trainable parameters.

    Args:
        new_tokens: Train the rows of the vision tokens in the token embedding and in the head. They are
            separate parameters that replace the frozen rows, so neither gradients nor weight decay can
            change other rows.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    settings: dict[str, Any] = {"target_modules": DUMMY_TARGET_MODULES}  # no layer
    if lora:
        settings = {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": _lora_targets(model, lora),
            "exclude_modules": [PATCH_EMBEDDING, HEAD, *_routers(model)],
        }
    if model.config.model_type == "solo":
        settings["modules_to_save"] = [PATCH_EMBEDDING]
    if new_tokens:
        settings["trainable_token_indices"] = _vision_token_rows(model)
    model.add_adapter(LoraConfig(**settings))


def has_adapters(model: PreTrainedModel) -> bool:
    """Return whether `add_adapters` was called on the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gather the trainable parameters on the CPU; a collective call of all processes."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge a saved adapter into its unquantized base model, in place; the result has no trace of PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()


def autocast(recipe: Recipe, context: DistributedContext) -> AbstractContextManager[Any]:
    """Return the autocast context of a run; FSDP casts the weights of a sharded model itself."""
    is_sharded = context.mesh is not None and not recipe.quantize
    if recipe.precision == "fp32" or is_sharded:
        return nullcontext()
    return torch.autocast(context.device.type, dtype=torch.bfloat16)


def use_float8(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the decoder's linear layers in float8 with tensorwise scaling; weights keep their precision.

    The patch embedding and the head stay in the recipe's precision.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        raise SoloError(
            "float8: requires a CUDA GPU of the Ada or Hopper generation or later; set it to false"
        )
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise SoloError("float8: requires torchao; pip install 'solo-vlm[low-bit]'") from error
    for layer in decoder_layers(model):
        convert_to_float8_training(layer)


def _load_checked(recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    """Load the base model of a recipe, and check that it keeps the documents of a packed row apart."""
    source = recipe.mixture.model_source()
    model, processor = load_base_model(source, recipe)
    tolerance = QUANTIZED if recipe.quantize else TOLERANCES[torch.float32]
    _require_positions(model, recipe.data.sequence_length)
    require_exact_packing(model, source, tolerance)
    return model, processor


@torch.no_grad()
def _require_positions(model: PreTrainedModel, length: int) -> None:
    """Check that a document as long as a packed sequence has positions: tables of them end, RoPE does not."""
    known, family = context_length(model.config), model.config.get_text_config().model_type
    if known is None or length <= known:
        return
    with torch.random.fork_rng(devices=[]):
        tiny = tiny_llm(family)
    beyond = torch.zeros(1, (context_length(tiny.config) or 0) + 1, dtype=torch.long)
    try:
        tiny(input_ids=beyond, use_cache=False)
    except (IndexError, RuntimeError) as error:
        raise SoloError(
            f"data.sequence_length = {length}: this {family} has positions for {known} tokens; set it to at "
            f"most {known}"
        ) from error


def _load_sharded(recipe: Recipe, context: DistributedContext) -> tuple[PreTrainedModel, Any]:
    """Read the weights in rank 0 only, and distribute them to the shards of all ranks."""
    world_size, source = context.dims.world_size, recipe.mixture.model_source()
    tp, cp = context.dims.tp, context.dims.cp

    def check() -> None:
        check_tensor_parallel(load_config(source), tp)
        check_context_parallel(load_config(source), cp, tp)

    if tp > 1 or cp > 1:
        context.broadcast_from_rank0(check)
    loaded: list[PreTrainedModel] = []

    def describe() -> tuple[type[PreTrainedModel], Any, Any, dict[str, Tensor], Any]:
        model, processor = _load_checked(recipe)
        if cp > 1:
            require_exact_slices(model, source, cp)
        set_trainable(model, recipe, world_size)
        loaded.append(model)
        return type(model), model.config, model.generation_config, dict(model.named_buffers()), processor

    model_class, config, generation_config, buffers, processor = context.broadcast_from_rank0(describe)
    with torch.device("meta"):
        model = model_class(config)
        model.generation_config = generation_config  # exported with the model
        set_trainable(model, recipe, world_size)
    if recipe.float8:
        use_float8(model, context.device)
    shard_model(model, recipe, context)
    load_full_state_dict(model, loaded[0].state_dict() if loaded else {}, buffers, context.device)
    return model, processor


def _lora_targets(model: PreTrainedModel, lora: LoraSettings) -> str | list[str]:
    if isinstance(lora.targets, str):
        return lora.targets
    linear = {name.split(".")[-1] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    names = linear - {PATCH_EMBEDDING, HEAD} - _routers(model)
    if unknown := set(lora.targets) - names:
        raise SoloError(
            f"lora.targets: the decoder has no linear layer {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(names))}"
        )
    return list(lora.targets)


def _routers(model: PreTrainedModel) -> set[str]:
    """Return the names of linear layers that choose experts and return tuples, which PEFT cannot adapt."""
    return {
        name.split(".")[-1]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "Router" in type(layer).__name__
    }


def _vision_token_rows(model: PreTrainedModel) -> dict[str, list[int]]:
    """Map layer names to the rows of the vision tokens; a tied head follows the embedding."""
    rows = list(model.config.vision_token_ids)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return {name: rows} if model.config.tie_word_embeddings else {name: rows, HEAD: rows}
