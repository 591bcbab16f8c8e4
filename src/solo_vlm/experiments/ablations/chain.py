"""From settings to models: every arm under every seed is a chain of them, and equal ones are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from solo_vlm.data.sources import open_source
from solo_vlm.experiments.ablations.settings import BASE, INIT, Ablation, InitSettings, Stages
from solo_vlm.experiments.launcher.training import TrainingRun
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import config_fingerprint
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import find_settings, merge, read_settings


@dataclass(frozen=True)
class Link:
    """A model of a chain: what it is made of, and how.

    Attributes:
        stage: that makes it.
        name: of the stage and the seed, with a digest of all that the model depends on: data, settings, and
            the links before.
        root: of the ablation.
        source: folder below the root, or hub id, of the model that this one is made of.
        parent: the link that makes the source; None where it is given.
        seed: of what is random.
        by: training, or composition from an LLM; None: the quickstart's decoder with random weights.
    """

    stage: str
    name: str
    root: Path
    source: str
    parent: Link | None
    seed: int
    by: Recipe | InitSettings | None

    @property
    def folder(self) -> Path:
        """Of the model and what belongs to it."""
        return self.root / "runs" / self.name

    @property
    def run(self) -> TrainingRun | None:
        """Of the training engine, where the model is trained."""
        return TrainingRun(self.name, self.by) if isinstance(self.by, Recipe) else None

    @property
    def finished(self) -> bool:
        """Whether the model was made; it may have been removed since."""
        return self.run.finished if self.run else self.ready

    @property
    def ready(self) -> bool:
        """Whether the model is there, to be trained on or measured."""
        return (self.folder / "model").is_dir() and (self.run is None or self.run.finished)

    @cached_property
    def depth(self) -> int:
        """Links before this one."""
        return self.parent.depth + 1 if self.parent else 0


@dataclass(frozen=True)
class Chain:
    """An arm under one seed.

    Attributes:
        arm: base or variant.
        seed: shared with the other arms, so that differences are paired.
        links: by stage the model that is there once its turn is over; where a stage is left out, that is the
            one before. None where it is the given LLM.
    """

    arm: str
    seed: int
    links: dict[str, Link | None]

    @property
    def stages(self) -> dict[str, Link]:
        """Without those that are left out."""
        return {stage: link for stage, link in self.links.items() if link and link.stage == stage}

    def after(self, stage: str | None) -> Link | None:
        """The model after a stage, by default the last."""
        return self.links[stage or next(reversed(self.links))]


def make_chains(ablation: Ablation, fraction: float = 1.0) -> list[Chain]:
    """All arms under all seeds, arm by arm.

    Args:
        ablation: as read.
        fraction: of the steps of all stages.

    Raises:
        SoloError: a stage's settings make no recipe.
    """
    maker = _ChainMaker(ablation, fraction)
    seeds = range(ablation.settings.seeds)
    return [maker.chain(arm, seed) for arm in ablation.settings.arms for seed in seeds]


def all_links(chains: Sequence[Chain]) -> list[Link]:
    """Every link once, those before each link first."""
    found = {link.name: link for chain in chains for end in chain.links.values() for link in _way_to(end)}
    return sorted(found.values(), key=lambda link: link.depth)


def _way_to(link: Link | None) -> Iterator[Link]:
    while link is not None:
        yield link
        link = link.parent


class _ChainMaker:
    def __init__(self, ablation: Ablation, fraction: float) -> None:
        self.folder = ablation.folder
        self.settings = ablation.settings
        self.root = Path(ablation.settings.root).resolve()  # of all processes, on whatever machine
        self.fraction = fraction
        self._fingerprints: dict[str, str] = {}

    def chain(self, arm: str, seed: int) -> Chain:
        changes = {} if arm == BASE else self.settings.variants[arm]
        stages: Stages = merge(self.settings.stages, changes)
        link = None if self.settings.llm else self._link("llm-untrained", "", None, seed, None)
        links = {}
        for stage, settings in stages.items():
            if settings is not None:
                link = self._next(arm, stage, settings, link, seed)
            links[stage] = link
        return Chain(arm, seed, links)

    def _next(self, arm: str, stage: str, settings: dict[str, Any], last: Link | None, seed: int) -> Link:
        origin = f"{arm}, stage {stage}"
        source = f"runs/{last.name}/model" if last else str(self.settings.llm)
        if stage == INIT:
            return self._link(stage, source, last, seed, InitSettings.parse(settings, origin))
        return self._link(stage, source, last, seed, self._recipe(origin, settings, source, seed))

    def _link(
        self, stage: str, source: str, parent: Link | None, seed: int, by: Recipe | InitSettings | None
    ) -> Link:
        facts = json.dumps([source, seed, *self._decisive(by)], sort_keys=True)
        name = f"{stage}-seed{seed}-{hashlib.sha256(facts.encode()).hexdigest()[:10]}"
        if isinstance(by, Recipe):
            by = by.model_copy(update={"out": f"runs/{name}"})
        return Link(stage, name, self.root, source, parent, seed, by)

    def _decisive(self, by: Recipe | InitSettings | None) -> list[Any]:
        """What the outcome depends on, as plain values."""
        if isinstance(by, Recipe):
            return [config_fingerprint(by), [self._fingerprint(path) for path in by.mixture.source_paths()]]
        settings = by or self.settings.toy_data
        return [settings.model_dump(mode="json", exclude_defaults=True) if settings else None]

    def _recipe(self, origin: str, settings: Mapping[str, Any], source: str, seed: int) -> Recipe:
        changes = {key: value for key, value in settings.items() if key != "recipe"}
        name = settings.get("recipe")
        plain = merge(read_settings(self._find(name), "recipe"), changes) if name else changes
        recipe = Recipe.parse({**plain, "root": str(self.root), "model": source, "out": ""}, origin)
        return recipe.model_copy(
            update={
                "steps": self._steps(origin, recipe.steps),
                "seed": recipe.seed + seed,
                "data": recipe.data.model_copy(update={"seed": recipe.data.seed + seed}),
            }
        )

    def _find(self, recipe: str) -> Path:
        beside = self.folder / recipe
        for path in (beside, beside.with_name(f"{beside.name}.yaml")):
            if path.is_file():
                return path
        return find_settings(recipe, "recipe")

    def _steps(self, origin: str, steps: int | None) -> int | None:
        if steps is None and self.fraction != 1:
            raise SoloError(f"{origin} has no steps to take a fraction of")
        return steps and max(1, round(steps * self.fraction))

    def _fingerprint(self, path: str) -> str:
        """Of data as they are; empty where they are not there yet, when nothing is trained on them either."""
        if path not in self._fingerprints:
            try:
                self._fingerprints[path] = open_source(path).fingerprint()
            except SoloError:
                self._fingerprints[path] = ""
        return self._fingerprints[path]
