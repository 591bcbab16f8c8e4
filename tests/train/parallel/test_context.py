"""How processes share a global batch, and what is said where they cannot."""

from __future__ import annotations

import pytest

from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.train.parallel.sharding import layers_per_fsdp_unit
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError


def recipe(*overrides: str) -> Recipe:
    settings = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}}
    return Recipe.parse(settings).override(overrides)


def test_the_paper_accumulates_32_sequences():
    """Tensor parallel 2 x data parallel 4, 128 sequences a step."""
    assert ParallelDims.from_recipe(recipe("parallel.tensor=2"), 8) == ParallelDims(4, 2, 32)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel.tensor=2"], 3, "a multiple of 2, or set parallel.tensor to one of 1 or 3"),
        (["global_batch=10"], 4, "set it to 8 or 12, or start 1 or 2 processes"),
        (["global_batch=10", "parallel.tensor=2"], 8, "set it to 8 or 12, or start 2 or 4 processes"),
        (["global_batch=2"], 3, "set it to 3, or start 1 or 2 processes"),
        (["data.streams=10", "data.workers=3"], 2, "2 data-parallel groups x 3 workers: set it to 6 or 12"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_could(overrides, processes, message):
    with pytest.raises(SoloError, match=message):
        ParallelDims.from_recipe(recipe(*overrides), processes)


@pytest.mark.parametrize(
    ("layers", "parameters", "together"),
    [
        (32, 218_112_000, 1),  # Mistral-7B
        (24, 67_000_000, 2),  # SmolLM2-1.7B
        (32, 9_840_000, 8),  # SmolLM2-360M
        (30, 3_541_000, 15),  # SmolLM2-135M: two units
        (2, 1_000, 2),
    ],
)
def test_small_layers_are_gathered_together(layers, parameters, together):
    assert layers_per_fsdp_unit(layers, parameters) == together
