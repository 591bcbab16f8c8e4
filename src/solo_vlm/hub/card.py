"""The model card: what a model is, how it was made, what it scores, what it is not for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from solo_vlm.convert.safetensors_files import open_safetensors
from solo_vlm.data.catalog.entry import DataSet
from solo_vlm.hub.evaluation import Evaluation
from solo_vlm.hub.folder import weights
from solo_vlm.hub.stage import Stage
from solo_vlm.models.load import load_config, load_processor
from solo_vlm.models.solo.processing_solo import num_image_tokens
from solo_vlm.utils.pages import render

_SIZES = ((336, 336), (640, 480), (1024, 768), (1920, 1080))  # (width, height) in pixels


@dataclass(frozen=True)
class Grid:
    """What an image of a size becomes."""

    width: int
    height: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Patches and what separates them."""
        return num_image_tokens(self.rows, self.columns)


def model_card(
    repo_id: str,
    model: Path,
    stages: Sequence[Stage] = (),
    evaluation: Evaluation | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """Write the card of a model.

    Args:
        repo_id: where it will be, `owner/name`.
        model: its folder.
        stages: its training, in order.
        evaluation: its scores.
        licence: the hub's id of one.
        base_model: hub id of the LLM that it grew out of.

    Raises:
        SoloError: the folder cannot be read.
    """
    entries = _entries(stages)
    results = evaluation.results() if evaluation else []
    data = ModelCardData(
        base_model=base_model,
        datasets=sorted({hub_id for entry in entries if (hub_id := _hub_id(entry))}) or None,
        eval_results=results or None,
        library_name="transformers",
        license=licence,
        model_name=repo_id.rpartition("/")[2],
        pipeline_tag="image-text-to-text",
        tags=["solo", "single-transformer", "custom_code"],
    )
    text = render(
        "solo_vlm.hub",
        "card.md.jinja",
        repo_id=repo_id,
        stages=stages,
        facts=_table(stages),
        entries=entries,
        evaluation=evaluation,
        licence=licence,
        base_model=base_model,
        **_model_facts(model),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _model_facts(model: Path) -> dict[str, Any]:
    config, images = load_config(model), load_processor(model).image_processor
    size = {side: pixels for side, pixels in dict(images.size).items() if pixels is not None}
    return {
        "parameters": sum(math.prod(t.shape) for f in weights(model) for t in open_safetensors(f).values()),
        "patch_parameters": config.patch_dim * config.text_config.hidden_size,
        "config": config,
        "longest_edge": max(size.values()),
        "fixed_size": None if "longest_edge" in size else size,
        "grids": [Grid(w, h, *images.get_patch_grid(h, w)) for w, h in _SIZES],
    }


def _table(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """Facts of all stages side by side, by name."""
    facts = [stage.facts() for stage in stages]
    names = dict.fromkeys(name for own in facts for name in own)
    return {name: [own.get(name, "") for own in facts] for name in names}


def _entries(stages: Sequence[Stage]) -> list[DataSet]:
    """The catalog's entries among the data, each once."""
    entries = {source.name: source.entry for stage in stages for source in stage.sources if source.entry}
    return list(entries.values())


def _hub_id(entry: DataSet) -> str | None:
    """The hub's id of a data set's source, where it is one."""
    return None if "://" in entry.source else entry.source.partition(":")[0]
