"""What a run starts from: the model with its processor, and the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from solo_vlm.data.encode import Encoder, load_encoder
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.mixture import DataSettings
from solo_vlm.data.sources import open_source
from solo_vlm.data.streams import MixtureItem, VirtualStream
from solo_vlm.errors import SoloError
from solo_vlm.model.load import load_model
from solo_vlm.train.recipe import Recipe


def load_start(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """A SOLO model and its processor, or a plain LLM and its tokenizer, with float32 weights.

    Args:
        path: folder or hub id.

    Raises:
        SoloError: the folder is not readable as either.
    """
    encoder = load_encoder(path)
    if encoder.sees_images:
        return load_model(path, dtype="float32"), encoder.processor
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32"), encoder.processor
    except (OSError, ValueError, KeyError) as error:
        raise SoloError(f"cannot read a model from {path}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class StreamMaker:
    """Builds the virtual streams of a run; a plain object that worker processes can be given."""

    paths: tuple[str, ...]
    settings: DataSettings
    encoder: Encoder

    def __call__(self, index: int) -> VirtualStream:
        settings = self.settings
        weights = [source.weight for source in settings.sources]
        return VirtualStream(
            index,
            settings.streams,
            [
                MixtureItem(open_source(path), weight)
                for path, weight in zip(self.paths, weights, strict=True)
            ],
            self.encoder,
            settings.sequence_length,
            seed=settings.seed,
            epochs=settings.epochs,
            weigh=settings.weigh,
            buffer_size=settings.packing_buffer,
            max_skipped=settings.max_skipped,
        )


def make_loader(recipe: Recipe, processor: Any) -> PackedLoader:
    """The loader of a run."""
    encoder = Encoder(processor)
    tokenizer = encoder.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PackedLoader(
        StreamMaker(recipe.source_paths(), recipe.data, encoder),
        recipe.data.streams,
        recipe.data.sequence_length,
        padding,
        workers=recipe.data.workers,
    )
