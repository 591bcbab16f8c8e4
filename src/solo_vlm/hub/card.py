"""Model card: architecture, training, scores and limits of a model.

A card contains no paths, hosts or users of the machine that the model was trained on.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from solo_vlm.convert.checkpoint_files import open_safetensors
from solo_vlm.data.catalog.entry import DATA_SETS, DataSet
from solo_vlm.data.mixture import LOADER_SETTINGS
from solo_vlm.data.sources.hub import HubPath
from solo_vlm.evaluate.benchmarks import BENCHMARKS, get
from solo_vlm.evaluate.run_folder import RunFolder, weights_hash
from solo_vlm.evaluate.scoring.score import Score, points, span
from solo_vlm.hub.folder import weight_files
from solo_vlm.models.load import PATCH_EMBEDDING, context_length, load_config, load_processor
from solo_vlm.models.solo.processing_solo import num_image_tokens
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import read_manifest_recipe
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.pages import render

_IMAGE_SIZES = ((336, 336), (640, 480), (1024, 768), (1920, 1080))  # (width, height) in pixels
# Recipe keys that name paths, or do not affect the model.
_OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw_bf16": "AdamW with bfloat16 moments",
    "adamw_8bit": "AdamW with 8-bit moments",
    "muon": "Muon with AdamW",
}
_PRIVATE = ("root", "model", "out", "trackers", "checkpoint", "log_interval")


def model_card(
    repo_id: str,
    model: Path,
    runs: Sequence[TrainingRun] = (),
    evaluation: Evaluation | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """Write the card of a model.

    Args:
        repo_id: Repository on the hub, `owner/name`.
        runs: Training runs that led to the model, in order.
        license, base_model: Hub IDs of the weights' license, and of the LLM the model was made from.

    Raises:
        SoloError: The folder cannot be read.
    """
    entries = list({s.name: s.entry for run in runs for s in run.sources if s.entry}.values())
    hub_ids = {entry.source.partition(":")[0] for entry in entries if "://" not in entry.source}
    data = ModelCardData(
        base_model=base_model,
        datasets=sorted(hub_ids) or None,
        eval_results=(evaluation.results() if evaluation else None) or None,
        library_name="transformers",
        license=license,
        model_name=repo_id.rpartition("/")[2],
        pipeline_tag="image-text-to-text",
        tags=["solo", "single-transformer", "custom_code"],
    )
    facts = [run.facts() for run in runs]
    names = dict.fromkeys(name for own in facts for name in own)
    text = render(
        "solo_vlm.hub",
        "card.md.jinja",
        points=points,
        span=span,
        repo_id=repo_id,
        runs=runs,
        facts={name: [own.get(name, "") for own in facts] for name in names},
        entries=entries,
        evaluation=evaluation,
        license=license,
        base_model=base_model,
        **_model_facts(model),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _model_facts(model: Path) -> dict[str, Any]:
    config, images = load_config(model), load_processor(model).image_processor
    size = {side: pixels for side, pixels in dict(images.size).items() if pixels is not None}
    grids = [(width, height, *images.get_patch_grid(height, width)) for width, height in _IMAGE_SIZES]
    sizes = {
        name: math.prod(tensor.shape)
        for file in weight_files(model)
        for name, tensor in open_safetensors(file).items()
    }
    return {
        "parameters": sum(sizes.values()),
        "patch_parameters": sum(size for name, size in sizes.items() if PATCH_EMBEDDING in name),
        "config": config,
        "context_length": context_length(config),
        "longest_edge": max(size.values()),
        "fixed_size": None if "longest_edge" in size else size,
        "grids": [(*grid, num_image_tokens(*grid[2:])) for grid in grids],
    }


@dataclass(frozen=True)
class DataSource:
    """A source of training data.

    Attributes:
        name: Name in the catalog if it has one, else the last part of the path.
        share: Share of the mixture, from 0 to 1.
        entry: Catalog entry.
        skipped: Number of skipped samples per reason.
    """

    name: str
    share: float
    entry: DataSet | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingRun:
    """One training run: settings, data and counts.

    Attributes:
        name: Name of the run's folder.
        recipe: Resolved recipe.
        manifest: Manifest of a finished run; empty otherwise.
    """

    name: str
    recipe: Recipe
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Path) -> Self:
        """Read the folder of a run.

        Raises:
            SoloError: The folder has neither `manifest.json` nor `recipe.yaml`, or they cannot be read.
        """
        name, manifest = run.resolve().name, run / "manifest.json"
        if manifest.is_file():
            return cls(name, read_manifest_recipe(manifest), json.loads(manifest.read_text()))
        if (run / "recipe.yaml").is_file():
            return cls(name, Recipe.load(run / "recipe.yaml"))
        raise SoloError(f"{run} is not the folder of a run: it has neither manifest.json nor recipe.yaml")

    @cached_property
    def sources(self) -> list[DataSource]:
        """Data sources in the recipe's order."""
        settings = self.recipe.data.sources
        total = sum(source.weight for source in settings)
        paths = self.recipe.mixture.source_paths()
        return [
            DataSource(
                public_name(source.path),
                source.weight / total,
                catalog_entry(source.path),
                self._skipped(path),
            )
            for source, path in zip(settings, paths, strict=True)
        ]

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Sequences, documents, tokens and samples read; empty if the run has not finished."""
        return self._outcome.get("data", {})

    def facts(self) -> dict[str, str]:
        """Return settings and metrics as text, by name."""
        recipe, optimizer, outcome = self.recipe, self.recipe.optimizer, self._outcome
        patches = optimizer.patch_learning_rate
        steps = f"{outcome['steps']:,}" if outcome else f"{recipe.steps or 'all data'}, not finished"

        def counted(name: str) -> str:
            return f"{self.counts.get(name, 0):,}" if self.counts else ""

        facts = {
            "optimizer steps": steps,
            "packed sequences per step": f"{recipe.global_batch:,}",
            "tokens per sequence": f"{recipe.data.sequence_length:,}",
            "tokens read": counted("tokens"),
            "samples read": counted("samples"),
            "samples skipped": counted("skipped"),
            "learning rate": f"{optimizer.learning_rate:g} to {optimizer.min_learning_rate:g}, cosine",
            "learning rate of the patch embedding": f"{patches:g}" if patches else "",
            "warmup steps": f"{optimizer.warmup_steps:,}",
            "optimizer": f"{_OPTIMIZERS[optimizer.name]}, "
            f"betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
            f"weight decay {optimizer.weight_decay:g}, gradients clipped at {optimizer.max_grad_norm:g}",
            "trained": self._trained(),
            "precision": recipe.precision,
            "hardware": self._hardware(),
            "software": self._software(),
        }
        return {name: fact for name, fact in facts.items() if fact}

    def settings(self) -> str:
        """Return the recipe as YAML: values that differ from the defaults, without paths."""
        private: Any = {**dict.fromkeys(_PRIVATE, True), "data": LOADER_SETTINGS}
        recipe = self.recipe.model_dump(mode="json", exclude_defaults=True, exclude=private)
        for part in (recipe["data"], recipe.get("validation") or {}):
            for source in (*part.get("sources", []), *part.get("questions", {}).values()):
                source |= {key: public_name(source[key]) for key in ("path", "images") if key in source}
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)

    @property
    def _outcome(self) -> Mapping[str, Any]:
        return self.manifest.get("outcome", {})

    def _skipped(self, path: str) -> dict[str, int]:
        prefix = f"skipped/{path}/"
        skipped = {
            name.removeprefix(prefix): count for name, count in self.counts.items() if name.startswith(prefix)
        }
        return {reason: count for reason, count in skipped.items() if "/" not in reason}

    def _trained(self) -> str:
        trained = {
            "all": "all weights",
            "patch_embedding": "the patch embedding",
            "new_tokens": "the patch embedding and SOLO's tokens",
        }[self.recipe.trainable]
        if not (lora := self.recipe.lora):
            return trained
        base = " over a 4-bit decoder (NF4)" if self.recipe.quantize else ""
        return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}{base}; merged"

    def _hardware(self) -> str:
        if not self.manifest:
            return ""
        gpus = Counter(self.manifest["hardware"]["gpus"])
        machine = ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "CPU"
        parallel = self._outcome["parallel"]
        return f"{machine}; processes: {parallel['dp']} data-parallel x {parallel['tp']} tensor-parallel"

    def _software(self) -> str:
        if not self.manifest:
            return ""
        versions = {"solo-vlm": self.manifest["solo_vlm"], **self.manifest["packages"]}
        named = [f"{name} {versions[name]}" for name in ("solo-vlm", "torch", "transformers")]
        commit = self.manifest["commit"]
        return ", ".join(named) + (f" (commit {commit[:12]})" if commit else "")


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model, and the software that computed them.

    Attributes:
        backend: Backend that ran the model.
        versions: Software versions by package.
    """

    scores: Sequence[Score]
    backend: str
    versions: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path, model: Path) -> Evaluation:
        """Read the evaluation of a model.

        Raises:
            SoloError: The folder is not an evaluation, or evaluates other weights.
        """
        run = RunFolder(folder)
        scores, metadata = run.read_scores(), run.read_metadata()
        try:
            about, versions = metadata["model"], metadata["versions"]
            sha256, backend = about["sha256"], about["backend"]
        except (KeyError, TypeError) as error:
            raise SoloError(f"{folder / 'run.json'} does not describe the model: {error}") from error
        if sha256 is None:
            raise SoloError(f"{folder} evaluates a model behind an API, which cannot be matched with {model}")
        if sha256 != weights_hash(model):
            raise SoloError(f"{folder} evaluates another model than {model}: their weights differ")
        return cls(scores, backend, versions)

    def results(self) -> list[EvalResult]:
        """Return the card's metadata; it can neither mark partial scores nor name other data sets."""
        return [_result(score) for score in self.scores if not score.partial and score.task in BENCHMARKS]


def _result(score: Score) -> EvalResult:
    benchmark = get(score.task)
    settings: dict[str, Any] = {"dataset_config": benchmark.hub_config, "dataset_split": benchmark.split}
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=benchmark.hub_id,
        dataset_name=score.title,
        metric_type="accuracy" if score.maximum == 100 else "score",
        metric_name=score.metric,
        metric_value=round(score.score, 2),
        **settings,
    )


def catalog_entry(path: str) -> DataSet | None:
    """Return the catalog entry of a data set of the hub, or that a path's last part or folder is named after.

    `slimpajama-stage1` counts as `slimpajama`, because recipes name the shares of the stages like this.
    """
    if place := HubPath.parse(path):
        sources = (place.repo, f"{place.repo}:{place.config}")
        return next((entry for entry in DATA_SETS.values() if entry.source in sources), None)
    for part in reversed(_parts(path)[-2:]):
        name = part.partition(".")[0]
        if entry := DATA_SETS.get(name) or DATA_SETS.get(re.sub(r"-stage\d+$", "", name)):
            return entry
    return None


def public_name(path: str) -> str:
    """Return the publishable part of a path or URL: the catalog's name, or the last part.

    A pattern below the recipe's root keeps its folder.
    """
    if entry := catalog_entry(path):
        return entry.name
    parts = _parts(path)
    below_root = "://" not in path and not path.startswith(("/", "~")) and ".." not in parts
    is_pattern = any(sign in parts[-1] for sign in "*?[")
    return "/".join(parts[-2:] if is_pattern and below_root else parts[-1:])


def _parts(path: str) -> list[str]:
    """Split a path; a URL loses its host, user and query, which must not be published."""
    return [
        part for part in PurePosixPath(urlsplit(path).path if "://" in path else path).parts if part != "/"
    ]
