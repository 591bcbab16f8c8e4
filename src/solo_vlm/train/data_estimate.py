"""What a run will read, from a sample of its data."""

from __future__ import annotations

from dataclasses import dataclass

from solo_vlm.data.encode import Encoder
from solo_vlm.data.stats import MixtureStats, mixture_stats
from solo_vlm.errors import SoloError
from solo_vlm.train.recipe import Recipe

_ROWS = 1000  # of each source, as many as `solo data stats` draws


@dataclass(frozen=True)
class DataEstimate:
    """What a run reads.

    Attributes:
        sequences: packed sequences in all passes over the data (`data.epochs`), or in one where that is not
            set.
        document_length: mean tokens of a document.
        vision_share: of vision tokens among all.
    """

    sequences: int
    document_length: float
    vision_share: float


def estimate_data(recipe: Recipe, encoder: Encoder) -> DataEstimate:
    """Look at some rows of each source, the same ones whenever it is called.

    Args:
        recipe: for the sources and how they are packed.
        encoder: of the model that shall read them.

    Raises:
        SoloError: a source is missing or unreadable, or no row that was looked at can be used.
    """
    stats = mixture_stats(recipe, encoder, _ROWS)
    if not stats.total.figures["tokens"]:
        raise SoloError(f"nothing in the data can be used: {stats.total.skipped}; see solo data verify")
    shares = _token_shares(recipe, stats)
    documents, vision = (
        sum(
            share * source.figures[name] / max(source.figures["tokens"], 1)
            for share, source in zip(shares, stats.sources.values(), strict=True)
        )
        / sum(shares)
        for name in ("samples", "vision_tokens")
    )  # a token
    return DataEstimate(_sequences(recipe, stats), 1 / documents, vision)


def _token_shares(recipe: Recipe, stats: MixtureStats) -> list[float]:
    """In what proportions the sources' tokens are read: all of them, or as the weights say."""
    figures = [source.figures for source in stats.sources.values()]
    if recipe.steps is None:
        return [source["tokens"] for source in figures]
    weights = [source.weight for source in recipe.data.sources]
    if recipe.data.weigh != "samples":
        return weights
    return [
        weight * source["tokens"] / max(source["samples"], 1)
        for weight, source in zip(weights, figures, strict=True)
    ]


def _sequences(recipe: Recipe, stats: MixtureStats) -> int:
    data = recipe.data
    # Each source was packed alone and has one last sequence, half full on average. A run has one for each
    # stream, and where sequences are weighed, for each stream and source.
    packers = data.streams * (len(data.sources) if data.weigh == "sequences" else 1)
    return round((data.epochs or 1) * stats.total.instances + (packers - len(data.sources)) / 2)
