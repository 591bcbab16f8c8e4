"""Published scores of other models, to stand beside one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedModel:
    """A model and its published scores.

    Attributes:
        name: of the model.
        source: the paper that presents it.
        scores: by benchmark, on the scale that this project uses.
        unverified: benchmarks whose figure could not be traced to its source.
    """

    name: str
    source: str
    scores: Mapping[str, float]
    unverified: frozenset[str] = field(default_factory=frozenset)


PUBLISHED = (
    PublishedModel(
        "SOLO-7B",
        "Chen et al. 2024, arXiv 2407.06438",
        {"mmstar": 35.5, "mme": 1260, "seedbench": 64.4, "ai2d": 61.4, "scienceqa": 73.3, "mathvista": 34.4},
        unverified=frozenset({"mmstar"}),
    ),
    PublishedModel(
        "LLaVA-1.5-7B",
        "Liu et al. 2023, arXiv 2310.03744, and later comparisons",
        {"mmstar": 33.1, "mme": 1859, "seedbench": 64.3, "ai2d": 54.8, "scienceqa": 66.8, "mathvista": 25.5},
    ),
    PublishedModel(
        "EVEv2-7B",
        "Diao et al. 2025, arXiv 2502.06788",
        {"mme": 1709, "seedbench": 71.4, "ai2d": 74.8, "scienceqa": 96.2, "mathvista": 60.0},
    ),
    PublishedModel(
        "NEO-9B",
        "Diao et al. 2025, arXiv 2510.14979",
        {"mmstar": 62.4, "seedbench": 76.3, "ai2d": 83.1},
    ),
)
