"""A training run as a model card tells it: settings, data and counts, without the places on this machine."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

from solo_vlm.data.catalog.entry import DataSet
from solo_vlm.data.catalog.registry import DATA_SETS
from solo_vlm.data.mixture import LOADER_SETTINGS
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import read_manifest_recipe
from solo_vlm.utils.errors import SoloError

# Places on this machine, and what says nothing about the model.
_PRIVATE = ("root", "model", "out", "trackers", "checkpoint", "log_interval")


@dataclass(frozen=True)
class DataSource:
    """A source of training data.

    Attributes:
        name: the catalog's where it is in there, else the last part of its path.
        share: of the mixture, from 0 to 1.
        entry: of the catalog, where the name is in there.
        skipped: samples that could not be used, by reason.
    """

    name: str
    share: float
    entry: DataSet | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
        name: of the run's folder.
        recipe: as resolved.
        manifest: what the run left; empty where it has not finished.
    """

    name: str
    recipe: Recipe
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Path) -> Self:
        """The stage of a run's folder.

        Raises:
            SoloError: it holds neither `manifest.json` nor `recipe.yaml`, or they cannot be read.
        """
        name, manifest = run.resolve().name, run / "manifest.json"
        if manifest.is_file():
            return cls(name, read_manifest_recipe(manifest), json.loads(manifest.read_text()))
        if (run / "recipe.yaml").is_file():
            return cls(name, Recipe.load(run / "recipe.yaml"))
        raise SoloError(f"{run} is not the folder of a run: it has neither manifest.json nor recipe.yaml")

    @cached_property
    def sources(self) -> list[DataSource]:
        """The data, in the recipe's order."""
        settings = self.recipe.data.sources
        total = sum(source.weight for source in settings)
        paths = self.recipe.mixture.source_paths()
        return [
            DataSource(
                public_name(source.path), source.weight / total, catalogued(source.path), self._skipped(path)
            )
            for source, path in zip(settings, paths, strict=True)
        ]

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """What was read: sequences, documents, tokens, samples; empty where the run has not finished."""
        return self._outcome.get("data", {})

    def facts(self) -> dict[str, str]:
        """Settings and figures in words, by name."""
        recipe, optimizer, outcome = self.recipe, self.recipe.optimizer, self._outcome
        patches = optimizer.patch_learning_rate
        steps = f"{outcome['steps']:,}" if outcome else f"{recipe.steps or 'as the data last'}, not finished"
        facts = {
            "optimizer steps": steps,
            "packed sequences a step": f"{recipe.global_batch:,}",
            "tokens a sequence": f"{recipe.data.sequence_length:,}",
            "tokens read": _count(self.counts, "tokens"),
            "samples read": _count(self.counts, "samples"),
            "samples skipped": _count(self.counts, "skipped"),
            "learning rate": f"{optimizer.learning_rate:g} to {optimizer.min_learning_rate:g}, cosine",
            "of the patch embedding": f"{patches:g}" if patches else "",
            "warm-up steps": f"{optimizer.warmup_steps:,}",
            "AdamW": f"betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
            f"weight decay {optimizer.weight_decay:g}, gradients clipped at {optimizer.max_grad_norm:g}",
            "trained": self._trained(),
            "precision": recipe.precision,
            "hardware": self._hardware(),
            "software": self._software(),
        }
        return {name: fact for name, fact in facts.items() if fact}

    def settings(self) -> str:
        """The recipe as YAML: what differs from the defaults, without places."""
        private: Any = {**dict.fromkeys(_PRIVATE, True), "data": LOADER_SETTINGS}
        recipe = self.recipe.model_dump(mode="json", exclude_defaults=True, exclude=private)
        for part in (recipe["data"], recipe.get("validation") or {}):
            for source in part.get("sources", []):
                source["path"] = public_name(source["path"])
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)

    @property
    def _outcome(self) -> Mapping[str, Any]:
        return self.manifest.get("outcome", {})

    def _skipped(self, path: str) -> dict[str, int]:
        """The loader's counts of one source, by reason."""
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
        base = " over a decoder in 4 bits (NF4)" if self.recipe.quantize else ""
        return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}{base}; merged"

    def _hardware(self) -> str:
        if not self.manifest:
            return ""
        gpus = Counter(self.manifest["hardware"]["gpus"])
        machine = ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "CPU"
        layout = self._outcome["processes"]
        return f"{machine}; processes: {layout['data']} data x {layout['tensor']} tensor"

    def _software(self) -> str:
        if not self.manifest:
            return ""
        versions = {"solo-vlm": self.manifest["solo_vlm"], **self.manifest["packages"]}
        named = [f"{name} {versions[name]}" for name in ("solo-vlm", "torch", "transformers")]
        commit = self.manifest["commit"]
        return ", ".join(named) + (f" (commit {commit[:12]})" if commit else "")


def catalogued(path: str) -> DataSet | None:
    """The catalog's entry that a path is named after: its last part, or the folder that holds it.

    `slimpajama-stage1` counts as `slimpajama`: the recipes name the shares of the stages so.
    """
    for part in reversed(_parts(path)[-2:]):
        name = part.partition(".")[0]
        if entry := DATA_SETS.get(name) or DATA_SETS.get(re.sub(r"-stage\d+$", "", name)):
            return entry
    return None


def public_name(path: str) -> str:
    """What the world may know of a path or URL: the catalog's name, or the last part.

    Of a pattern below the recipe's root, the folder is named too.
    """
    if entry := catalogued(path):
        return entry.name
    parts = _parts(path)
    below_root = "://" not in path and not path.startswith(("/", "~")) and ".." not in parts
    is_pattern = any(sign in parts[-1] for sign in "*?[")
    return "/".join(parts[-2:] if is_pattern and below_root else parts[-1:])


def _parts(path: str) -> list[str]:
    """Parts of a path, without a URL's host, user or query, none of which is for the world."""
    return [
        part for part in PurePosixPath(urlsplit(path).path if "://" in path else path).parts if part != "/"
    ]


def _count(counts: Mapping[str, int], name: str) -> str:
    return f"{counts.get(name, 0):,}" if counts else ""
