"""What a run starts from: the model with its processor, and the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from solo_vlm.data.encode import Encoder, load_encoder
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.mixture import DataSettings, Mixture
from solo_vlm.data.sources import Source
from solo_vlm.data.sources.units import SharedUnits
from solo_vlm.data.streams import MixtureItem, VirtualStream
from solo_vlm.models.load import load_model
from solo_vlm.models.quantization import quantization_config
from solo_vlm.train.activation_checkpointing import use_activation_checkpointing
from solo_vlm.train.attention import use_packed_attention
from solo_vlm.train.compilation import compile_layers, use_float8
from solo_vlm.train.parallel.processes import Processes
from solo_vlm.train.parallel.shard import fill, shard
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.trainable import choose_trainable
from solo_vlm.utils.errors import SoloError


def load_start(path: str | Path, recipe: Recipe | None = None) -> tuple[PreTrainedModel, Any]:
    """A SOLO model and its processor, or a plain LLM and its tokenizer, with float32 weights.

    Args:
        path: folder or hub id.
        recipe: may ask for 4-bit weights.

    Raises:
        SoloError: the folder is not readable as either.
    """
    encoder = load_encoder(path)
    options: dict[str, Any] = {"dtype": "float32"}
    if recipe and recipe.quantize:
        computed_in = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        options["quantization_config"] = quantization_config(recipe.quantize, computed_in)
    if encoder.sees_images:
        # In main memory first: a model that needs several accelerators does not fit into one.
        place = None if "quantization_config" in options else "cpu"
        return load_model(path, device=place, **options), encoder.processor
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options), encoder.processor
    except (OSError, ValueError, KeyError) as error:
        raise SoloError(f"cannot read a model from {path}: {str(error).splitlines()[0]}") from error


def make_model(recipe: Recipe, processes: Processes) -> tuple[PreTrainedModel, Any]:
    """The model that a recipe starts from, ready to train on these processes, and its processor.

    Raises:
        SoloError: the model cannot be read, or not be trained or shared as the recipe asks.
    """
    load = _load_whole if processes.mesh is None else _load_sharded
    model, processor = load(recipe, processes)
    use_activation_checkpointing(model, recipe.activation_checkpointing)
    use_packed_attention(model)
    if recipe.compile:
        compile_layers(model)
    return model.train(), processor


def _load_whole(recipe: Recipe, processes: Processes) -> tuple[PreTrainedModel, Any]:
    model, processor = load_start(recipe.model_source(), recipe)
    choose_trainable(model, recipe)
    if recipe.float8:
        use_float8(model, processes.device)
    return model, processor


def _load_sharded(recipe: Recipe, processes: Processes) -> tuple[PreTrainedModel, Any]:
    """The first process alone reads the weights; the others, and its own shards, are filled from there."""
    if recipe.quantize:  # of one process, on an accelerator
        model, processor = load_start(recipe.model_source(), recipe)
        choose_trainable(model, recipe, processes.layout.processes)
        return model.to(processes.device), processor
    read: list[PreTrainedModel] = []

    def describe() -> tuple[
        type[PreTrainedModel], PreTrainedConfig, GenerationConfig | None, dict[str, Tensor], Any
    ]:
        model, processor = load_start(recipe.model_source(), recipe)
        choose_trainable(model, recipe, processes.layout.processes)
        read.append(model)
        return type(model), model.config, model.generation_config, dict(model.named_buffers()), processor

    kind, config, generation_config, buffers, processor = processes.decide(describe)
    with torch.device("meta"):
        model = kind(config)
        model.generation_config = generation_config  # it is exported with the model
        choose_trainable(model, recipe, processes.layout.processes)
    if recipe.float8:
        use_float8(model, processes.device)
    shard(model, recipe, processes)
    fill(model, read[0].state_dict() if read else {}, buffers, processes.device)
    return model, processor


@dataclass(frozen=True)
class StreamMaker:
    """Builds the virtual streams of a run; a plain object that worker processes can be given."""

    sources: Sequence[Source]
    settings: DataSettings
    encoder: Encoder

    def __call__(self, index: int) -> VirtualStream:
        settings = self.settings
        weights = [source.weight for source in settings.sources]
        return VirtualStream(
            index,
            settings.streams,
            [MixtureItem(*item) for item in zip(self.sources, weights, strict=True)],
            self.encoder,
            settings.sequence_length,
            seed=settings.seed,
            epochs=settings.epochs,
            weigh=settings.weigh,
            buffer_size=settings.packing_buffer,
            max_skipped=settings.max_skipped,
        )


def make_loader(
    mixture: Mixture, processor: Any, sources: list[Source], rank: int = 0, ranks: int = 1
) -> PackedLoader:
    """The loader of one share of a run's data."""
    encoder = Encoder(processor, mixture.data.vision_loss)
    tokenizer = encoder.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PackedLoader(
        StreamMaker([SharedUnits(source) for source in sources], mixture.data, encoder),
        mixture.data.streams,
        mixture.data.sequence_length,
        padding,
        rank=rank,
        ranks=ranks,
        workers=mixture.data.workers,
        threads=mixture.data.threads,
        sources=sources,
        patch_dim=encoder.patch_dim,
    )
