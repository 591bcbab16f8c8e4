"""Pipelines of an ablation: the stages of each variant and seed, their data and initial models.

Stages with the same settings, data and predecessors are the same stage and are trained once.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solo_vlm.data.mixture import Mixture, SourceSettings
from solo_vlm.data.sample import Sample, parse_sample
from solo_vlm.data.sources import all_rows
from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.experiments.ablations.settings import (
    BASE,
    INIT,
    Ablation,
    AblationSettings,
    InitSettings,
    StageSettings,
    describe_changes,
)
from solo_vlm.experiments.launcher import TrainingRun
from solo_vlm.quickstart.data.files import draw_toy_data
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import config_fingerprint
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import find_settings, merge, read_settings

if TYPE_CHECKING:
    from solo_vlm.models.from_llm import SoloModelAndProcessor


@dataclass(frozen=True)
class Stage:
    """Stage of a pipeline, which writes one model.

    Attributes:
        run_name: Name of the run: stage, seed, and a digest of everything that the model depends on (data,
            settings, preceding stages).
        source: Folder below the root, or hub ID, of the input model.
        parent: Stage that writes the input model; None for a given model.
        settings: Recipe of a training stage, or settings of `init`; None for the quickstart's decoder with
            random weights.
    """

    name: str
    run_name: str
    root: Path
    source: str
    parent: Stage | None
    seed: int
    settings: Recipe | InitSettings | None

    @property
    def folder(self) -> Path:
        """Folder of the run; the model is in `model/`."""
        return self.root / "runs" / self.run_name

    @property
    def run(self) -> TrainingRun | None:
        """The training run; None for a stage that does not train."""
        return TrainingRun(self.run_name, self.settings) if isinstance(self.settings, Recipe) else None

    @property
    def finished(self) -> bool:
        """Whether the stage has run; its model may have been removed since."""
        return self.run.finished if self.run else self.has_model

    @property
    def has_model(self) -> bool:
        """Whether the finished model is on disk."""
        return (self.folder / "model").is_dir() and (self.run is None or self.run.finished)

    @cached_property
    def depth(self) -> int:
        """Number of preceding stages."""
        return self.parent.depth + 1 if self.parent else 0


@dataclass(frozen=True)
class Pipeline:
    """Stages of one variant with one seed.

    Attributes:
        variant: Name of the variant, or `base`.
        seed: Seed, shared by all variants, so that their differences are paired.
        outputs: Stage whose model is current after each stage name; for a skipped stage, the preceding one,
            or None for the given LLM.
    """

    variant: str
    seed: int
    outputs: dict[str, Stage | None]

    @property
    def stages(self) -> dict[str, Stage]:
        """Stages by name, without the skipped ones."""
        return {name: stage for name, stage in self.outputs.items() if stage and stage.name == name}

    def after(self, name: str | None) -> Stage | None:
        """Return the stage whose model is current after the named stage (default: the last)."""
        return self.outputs[name or next(reversed(self.outputs))]


def build_pipelines(ablation: Ablation, fraction: float = 1.0) -> list[Pipeline]:
    """Build the pipelines of all variants and seeds, ordered by variant.

    `fraction` is the share of the steps of every stage to train.
    """
    builder = _PipelineBuilder(ablation, fraction)
    seeds = range(ablation.settings.seeds)
    return [builder.build(variant, seed) for variant in ablation.settings.variant_names for seed in seeds]


def all_stages(pipelines: Sequence[Pipeline]) -> list[Stage]:
    """Return every distinct stage of the pipelines, predecessors first."""
    return _with_parents(
        (stage for pipeline in pipelines for stage in pipeline.outputs.values()), lambda stage: True
    )


def missing_stages(targets: Iterable[Stage]) -> list[Stage]:
    """Return the stages that must run to obtain the models of `targets`, predecessors first."""
    return _with_parents(targets, lambda stage: not stage.has_model)


def _with_parents(stages: Iterable[Stage | None], needed: Callable[[Stage], bool]) -> list[Stage]:
    found: dict[str, Stage] = {}
    for stage in stages:
        while stage is not None and stage.run_name not in found and needed(stage):
            found[stage.run_name] = stage
            stage = stage.parent
    return sorted(found.values(), key=lambda stage: stage.depth)


def make_plan(ablation: Ablation, fraction: float = 1.0) -> dict[str, Any]:
    """Return the plan of an ablation, as plain values.

    `variants` has the changes and stages of each variant, and each stage its `steps` and the folders of its
    runs (one per seed) with whether they are finished; `missing` counts runs and steps.
    """
    pipelines = build_pipelines(ablation, fraction)
    changes = {BASE: {}, **ablation.settings.variants}
    variants: dict[str, Any] = {}
    for pipeline in pipelines:
        name = pipeline.variant
        variant = variants.setdefault(name, {"changes": describe_changes(changes[name]), "stages": {}})
        for stage_name, stage in pipeline.stages.items():
            planned = variant["stages"].setdefault(stage_name, {"steps": _steps(stage), "runs": {}})
            planned["runs"][str(stage.folder)] = stage.finished
    missing = [stage for stage in all_stages(pipelines) if stage.run and not stage.finished]
    return {
        "ablation": ablation.name,
        "question": ablation.settings.question,
        "seeds": ablation.settings.seeds,
        "variants": variants,
        "missing": {"runs": len(missing), "steps": sum(_steps(stage) or 0 for stage in missing)},
    }


def prepare_data(settings: AblationSettings) -> None:
    """Write the toy data and the derived files, unless they exist."""
    root = Path(settings.root)
    if settings.toy_data:
        draw_toy_data(root / "data", settings.toy_data)
    for out, source in settings.shuffle_images.items():
        if not (root / out).exists():
            shuffle_images(root / source, root / out)


def shuffle_images(source: Path, out: Path, seed: int = 0) -> None:
    """Write a copy of a source with its images randomly permuted among the samples.

    The permutation breaks the relation between image and text and keeps everything else: samples exchange
    images only with samples that have the same number of images. All samples are held in memory.
    """
    samples = [parse_sample(row) for row in all_rows(source)]
    by_images: dict[int, list[int]] = defaultdict(list)  # number of images -> indices of samples
    for index, sample in enumerate(samples):
        by_images[len(sample.images)].append(index)
    shuffled = list(samples)
    rng = np.random.default_rng(seed)
    for indices in by_images.values():
        for index, other in zip(indices, rng.permutation(indices), strict=True):
            shuffled[index] = replace(samples[index], images=samples[other].images)
    write_samples(out, map(_row, shuffled))


def _row(sample: Sample) -> dict[str, Any]:
    images = [
        {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": image}
        for image in sample.images
    ]
    return {"id": sample.id, "messages": sample.messages, "images": images}


def write_initial_model(stage: Stage) -> None:
    """Write the model of a stage that does not train: the untrained decoder, or a SOLO model from an LLM."""
    from solo_vlm.quickstart.llm import training_texts, write_untrained_llm

    model = stage.folder / "model"
    if isinstance(stage.settings, InitSettings):
        local = stage.root / stage.source
        _compose(local if local.exists() else stage.source, stage.settings, stage.seed).save(model)
    else:
        data = stage.root / "data"
        names = [name for name in ("text", "sft", "grids") if (data / f"{name}.parquet").is_file()]
        write_untrained_llm(model, training_texts(data, names), stage.seed)


def _compose(llm: str | Path, settings: InitSettings, seed: int) -> SoloModelAndProcessor:
    from transformers import AutoModelForCausalLM, set_seed

    from solo_vlm.models.from_llm import ImageDesign, compose, from_llm
    from solo_vlm.models.load import load_config, load_tokenizer
    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor

    try:
        size = {"size": settings.image_size} if settings.image_size else {}
        image_processor = SoloImageProcessor(**size, max_patches=settings.max_patches)
    except ValueError as error:
        raise SoloError(f"init.image_size: {error}") from error
    design = ImageDesign(
        settings.image_attention, settings.image_positions, settings.rope_base_2d, settings.patch_embedding
    )
    if settings.from_scratch:
        config, tokenizer = load_config(llm), load_tokenizer(llm)
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        return compose(model, tokenizer, seed, image_processor, design)
    return from_llm(llm, seed=seed, image_processor=image_processor, design=design)


def _steps(stage: Stage) -> int | None:
    return stage.run.recipe.steps if stage.run else None


class _PipelineBuilder:
    def __init__(self, ablation: Ablation, fraction: float) -> None:
        self.folder = ablation.folder
        self.settings = ablation.settings
        self.root = Path(ablation.settings.root).resolve()  # jobs may run in another working directory
        self.fraction = fraction
        self._fingerprints: dict[str, str] = {}

    def build(self, variant: str, seed: int) -> Pipeline:
        changes = {} if variant == BASE else self.settings.variants[variant]
        merged: StageSettings = merge(self.settings.stages, changes)
        stage = None if self.settings.llm else self._stage("llm-untrained", "", None, seed, None)
        outputs = {}
        for name, settings in merged.items():
            if settings is not None:
                source = f"runs/{stage.run_name}/model" if stage else str(self.settings.llm)
                parse = InitSettings.parse if name == INIT else partial(self._recipe, source, seed)
                stage = self._stage(name, source, stage, seed, parse(settings, f"{variant}, stage {name}"))
            outputs[name] = stage
        return Pipeline(variant, seed, outputs)

    def _stage(
        self, name: str, source: str, parent: Stage | None, seed: int, settings: Recipe | InitSettings | None
    ) -> Stage:
        facts = json.dumps([source, seed, *self._identity(settings)], sort_keys=True)
        run_name = f"{name}-seed{seed}-{hashlib.sha256(facts.encode()).hexdigest()[:10]}"
        if isinstance(settings, Recipe):
            settings = settings.model_copy(update={"out": f"runs/{run_name}"})
        return Stage(name, run_name, self.root, source, parent, seed, settings)

    def _identity(self, settings: Recipe | InitSettings | None) -> list[Any]:
        """Return everything that the model depends on, as plain values."""
        if isinstance(settings, Recipe):
            return [
                config_fingerprint(settings),
                [self._fingerprint(source, settings.mixture) for source in settings.data.sources],
            ]
        plain = settings or self.settings.toy_data
        return [plain.model_dump(mode="json", exclude_defaults=True) if plain else None]

    def _recipe(self, source: str, seed: int, settings: Mapping[str, Any], origin: str) -> Recipe:
        changes = {key: value for key, value in settings.items() if key != "recipe"}
        name = settings.get("recipe")
        if name:
            changes = merge(read_settings(find_settings(name, "recipe", self.folder), "recipe"), changes)
        recipe = Recipe.parse({**changes, "root": str(self.root), "model": source, "out": ""}, origin)
        if recipe.steps is None and self.fraction != 1:
            raise SoloError(f"{origin} has no steps, so --fraction does not apply")
        return recipe.model_copy(
            update={
                "steps": recipe.steps and max(1, round(recipe.steps * self.fraction)),
                "seed": recipe.seed + seed,
                "data": recipe.data.model_copy(update={"seed": recipe.data.seed + seed}),
            }
        )

    def _fingerprint(self, source: SourceSettings, mixture: Mixture) -> str:
        """Return the fingerprint of data; empty for missing data, which no run has used yet."""
        key = source.model_dump_json(exclude={"weight"})
        if key not in self._fingerprints:
            try:
                self._fingerprints[key] = source.open(at=mixture.source_path).fingerprint()
            except SoloError:
                self._fingerprints[key] = ""
        return self._fingerprints[key]
