"""What a run starts from: the model with its processor, and the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from solo_vlm.data.encode import Document, encode, encode_text
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.schema import Sample
from solo_vlm.data.sources import Source, open_source
from solo_vlm.data.streams import MixtureItem, VirtualStream
from solo_vlm.errors import SoloError
from solo_vlm.model.load import is_solo, load_model, load_processor
from solo_vlm.train.recipe import DataSettings, Recipe


def load_start(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """A SOLO model and its processor, or a plain LLM and its tokenizer, with float32 weights.

    Args:
        path: folder or hub id.

    Raises:
        SoloError: the folder is not readable as either.
    """
    if is_solo(path):
        return load_model(path, dtype="float32"), load_processor(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        return model, AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise SoloError(f"cannot read a model from {path}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Encoder:
    """Encodes samples with a processor; or texts alone with a tokenizer, for an LLM."""

    processor: Any

    def __call__(self, sample: Sample) -> Document:
        if hasattr(self.processor, "image_processor"):
            return encode(sample, self.processor)
        return encode_text(sample, self.processor)


@dataclass(frozen=True)
class StreamMaker:
    """Builds the virtual streams of a run; a plain object that worker processes can be given."""

    paths: tuple[Path, ...]
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


def open_sources(recipe: Recipe) -> list[Source]:
    """The sources of a mixture, opened; a first look at whether they are there."""
    return [open_source(path) for path in _paths(recipe)]


def make_loader(recipe: Recipe, processor: Any) -> PackedLoader:
    """The loader of a run."""
    tokenizer = getattr(processor, "tokenizer", processor)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PackedLoader(
        StreamMaker(_paths(recipe), recipe.data, Encoder(processor)),
        recipe.data.streams,
        recipe.data.sequence_length,
        padding,
        workers=recipe.data.workers,
    )


def _paths(recipe: Recipe) -> tuple[Path, ...]:
    return tuple(recipe.at(source.path) for source in recipe.data.sources)
