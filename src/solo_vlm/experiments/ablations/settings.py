"""Settings of an ablation: a pipeline of stages, and variants that change one or two fields of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from solo_vlm.quickstart.data.files import ToySettings
from solo_vlm.utils.errors import SoloError, did_you_mean
from solo_vlm.utils.settings import Settings, find_settings, list_settings, merge, override, read_settings

BASE = "base"  # the variant without changes, which the others are compared with
INIT = "init"  # the stage that makes a SOLO model from an LLM

StageSettings = dict[str, dict[str, Any] | None]

_FOLDER = "ablations"  # among the package's recipes
_SET_BY_PIPELINE = ("root", "model", "out", "seed")


class InitSettings(Settings):
    """Settings of the stage `init`, which makes a SOLO model from an LLM.

    Attributes:
        image_size: `{longest_edge: pixels}`, or `{height: pixels, width: pixels}` to resize every image to
            one size. Default: native resolution up to 1024 pixels.
        max_patches: Budget of patches per image.
        image_attention, image_positions, rope_base_2d, patch_embedding: See `SoloConfig`.
        from_scratch: Replace the LLM's weights by random ones.
    """

    image_size: dict[Literal["longest_edge", "height", "width"], PositiveInt] | None = None
    max_patches: PositiveInt | None = None
    image_attention: Literal["causal", "bidirectional"] = "causal"
    image_positions: Literal["1d", "2d"] = "1d"
    rope_base_2d: float | None = None
    patch_embedding: Literal["linear", "conv"] = "linear"
    from_scratch: bool = False


class HeldOutSettings(Settings):
    """Held-out samples, and the stage after which models are measured on them. A plain path sets `data`.

    Attributes:
        data: File or folder.
        after: Name of the stage; a variant that skips it is measured at the same point. Default: the last.
    """

    data: str
    after: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_path(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str) else value


class AxisSettings(Settings):
    """X axis of the plots, for variants that can be ordered.

    Attributes:
        label: Label with the unit.
        values: Position of each variant, including the base.
    """

    label: str
    values: dict[str, float]


class AblationSettings(Settings):
    """A pipeline of stages (the base), its variants, and the metrics. Paths are relative to `root`.

    Attributes:
        root: Folder for data, models and results. Ablations with the same root share identical runs.
        question: Question that the ablation answers.
        toy_data: Toy data to write to `data/` first.
        shuffle_images: Files to derive, by path: each is a copy of the named file with its images permuted
            at random among the samples.
        llm: Folder or hub ID of the LLM to start from (a SOLO model, if no stage is `init`). Default: the
            quickstart's decoder with random weights.
        stages: Stages in order. `init` takes `InitSettings`. Every other stage is a training recipe without
            `root`, `model`, `out` and `seed`, or a set of changes to the recipe named by its key `recipe`:
            a file next to the ablation's, or a recipe of the package. A stage set to null is skipped.
        variants: Changes to the stages, by name of the variant.
        factors: Changes to the stages, by name of the factor, in place of variants: every combination becomes
            a variant, and the report has main effects and interactions.
        scores: Held-out chats by name, measured by the share of correct generated answers.
        losses: Held-out samples by name, measured by the loss on their supervised tokens.
        axis: The x axis, for variants that can be ordered.
        seeds: Number of repetitions, at least 2. A seed changes initial weights, data order and training; it
            is added to the seeds of the recipes.
    """

    root: str
    question: str
    toy_data: ToySettings | None = None
    shuffle_images: dict[str, str] = Field(default_factory=dict)
    llm: str | None = None
    stages: StageSettings = Field(min_length=1)
    variants: dict[str, StageSettings] = Field(min_length=1)
    factors: dict[str, StageSettings] = Field(default_factory=dict)
    scores: dict[str, HeldOutSettings] = Field(default_factory=dict)
    losses: dict[str, HeldOutSettings] = Field(default_factory=dict)
    axis: AxisSettings | None = None
    seeds: int = Field(3, ge=2)

    @property
    def metrics(self) -> dict[str, HeldOutSettings]:
        """Scores and losses by metric name; a loss is named `NAME loss`."""
        return self.scores | {f"{name} loss": held_out for name, held_out in self.losses.items()}

    @property
    def variant_names(self) -> tuple[str, ...]:
        """Names of the base and the variants."""
        return (BASE, *self.variants)

    @model_validator(mode="before")
    @classmethod
    def _combine_factors(cls, values: Any) -> Any:
        factors = values.get("factors") if isinstance(values, dict) else None
        if not isinstance(factors, dict):
            return values
        combined = {
            join_factors(names): reduce(merge, (factors[name] for name in names))
            for number in range(1, len(factors) + 1)
            for names in combinations(factors, number)
        }
        if values.get("variants") not in (None, combined):
            raise ValueError("give variants or factors, not both")
        return values | {"variants": combined}

    @model_validator(mode="after")
    def _check(self) -> AblationSettings:
        if BASE in self.variants:
            raise ValueError(f"no variant can be called {BASE}: the name stands for the unchanged pipeline")
        if not self.metrics:
            raise ValueError("there is nothing to measure: give scores or losses")
        if self.llm is None and self.toy_data is None:
            raise ValueError("give an llm, or toy_data to train the quickstart's decoder")
        for where, stages in (("stages", self.stages), *self.variants.items()):
            for stage, changes in stages.items():
                _check_known(where, "stage", stage, self.stages)
                if taken := set(_SET_BY_PIPELINE) & (changes or {}).keys():
                    raise ValueError(f"{where}.{stage}.{min(taken)} is set by the pipeline: remove it")
        for name, held_out in self.metrics.items():
            if held_out.after is not None:
                _check_known(name, "stage", held_out.after, self.stages)
        if self.axis:
            for variant in self.variant_names:
                _check_known("axis.values", "value for", variant, self.axis.values)
        return self


def join_factors(names: Iterable[str]) -> str:
    """Return the name of the variant that combines factors; without any, that of the base."""
    return " + ".join(names) or BASE


@dataclass(frozen=True)
class Ablation:
    """Ablation, loaded from a file.

    Attributes:
        name: Stem of the file name.
        folder: Folder of the file, searched first for the recipes that the ablation names.
    """

    name: str
    folder: Path
    settings: AblationSettings

    @classmethod
    def load(cls, name: str, overrides: Sequence[str] = (), **given: Any) -> Ablation:
        """Load an ablation from a file, or one of the package's.

        Args:
            name: Path of the file, or a name such as `no-stage1`.
            **given: Top-level settings that replace the file's.

        Raises:
            SoloError: The file does not exist, or has an unknown key or an invalid value.
        """
        path = _find(name)
        settings = override(read_settings(path, "ablation"), overrides) | given
        return cls(path.stem, path.parent, AblationSettings.parse(settings, origin=str(path)))


def list_ablations() -> dict[str, str]:
    """Return the questions of the package's ablations, by name."""
    read = {path.stem: read_settings(path, "ablation") for path in list_settings(_FOLDER)}
    return {name: settings["question"] for name, settings in read.items() if "question" in settings}


def describe_changes(changes: StageSettings) -> list[str]:
    """Describe the changes of a variant, such as `stage2.steps = 500` or `without stage1`."""
    return [line for stage, settings in changes.items() for line in _describe(stage, settings)]


def _describe(key: str, value: Any) -> Iterator[str]:
    if value is None:
        yield f"without {key}"
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _describe(f"{key}.{name}", part)
    else:
        yield f"{key} = {json.dumps(value)}"


def _find(name: str) -> Path:
    try:
        return find_settings(name, "ablation")
    except SoloError:
        names = list_ablations()
    if name not in names:
        raise SoloError(f"no ablation {name}: give the path of a YAML file, or one of {', '.join(names)}")
    return find_settings(f"{_FOLDER}/{name}", "ablation")


def _check_known(where: str, what: str, name: str, known: dict[str, Any]) -> None:
    if name not in known:
        raise ValueError(f"{where}: no {what} {name}{did_you_mean(name, known)}")
