"""An ablation as typed settings: a chain of stages, and variants that change one or two fields of it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from solo_vlm.quickstart.data.drawn import ToySettings
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import Settings, find_settings, list_settings, override, read_settings

BASE = "base"  # the arm that the variants are compared with
INIT = "init"  # the stage that makes a SOLO model of an LLM

Stages = dict[str, dict[str, Any] | None]

_FOLDER = "ablations"  # of the package's recipes
_SET_BY_CHAIN = ("root", "model", "out", "seed")


class InitSettings(Settings):
    """The stage `init`: an LLM becomes a SOLO model.

    Attributes:
        image_size: `{longest_edge: pixels}`, or `{height: pixels, width: pixels}` for one size of all images;
            default: native resolution up to 1024 pixels.
        bidirectional_images: the patches of an image see each other in both directions.
        from_scratch: random weights in place of the LLM's.
    """

    image_size: dict[Literal["longest_edge", "height", "width"], PositiveInt] | None = None
    bidirectional_images: bool = False
    from_scratch: bool = False


class HeldOutSettings(Settings):
    """Held-out samples, and where in the chain a model is measured on them. A path alone is `data`.

    Attributes:
        data: file or folder.
        after: stage, whether an arm has it or leaves it out; default: the last one.
    """

    data: str
    after: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str) else value


class AxisSettings(Settings):
    """For variants in an order: what to draw them over.

    Attributes:
        label: of the axis, with the unit.
        values: where each arm lies, the base too.
    """

    label: str
    values: dict[str, float]


class AblationSettings(Settings):
    """A chain of stages (the base), variants of it, and what they are measured on. Paths count from `root`.

    Attributes:
        root: folder of everything; ablations with the same root share what is trained alike.
        question: that the ablation is to answer.
        toy_data: draw the embedded toy data into `data/` first.
        shuffle_images: files to derive: a new path, and the file whose images are dealt out anew among its
            samples.
        llm: folder or hub id of the LLM to start from (a SOLO model, where no stage is `init`); default: the
            quickstart's decoder with random weights.
        stages: in order. `init` has `InitSettings`. Every other one is a recipe of the training engine
            without `root`, `model`, `out` and `seed`, or what it changes in the recipe that its key `recipe`
            names: a file beside the ablation's, or a recipe of the package. One that is null is left out.
        variants: by name, what each changes in the stages.
        scores: held-out chats by name; measured is the share of generated answers that are right.
        losses: held-out samples by name; measured is the loss on what they say.
        axis: for variants in an order.
        seeds: how often everything is repeated, at least twice. A seed changes the first weights, the order
            of the data and the training; it is added to the seeds of the recipes.
    """

    root: str
    question: str
    toy_data: ToySettings | None = None
    shuffle_images: dict[str, str] = Field(default_factory=dict)
    llm: str | None = None
    stages: Stages = Field(min_length=1)
    variants: dict[str, Stages] = Field(min_length=1)
    scores: dict[str, HeldOutSettings] = Field(default_factory=dict)
    losses: dict[str, HeldOutSettings] = Field(default_factory=dict)
    axis: AxisSettings | None = None
    seeds: int = Field(3, ge=2)

    @property
    def metrics(self) -> dict[str, HeldOutSettings]:
        """Scores and losses, by names that tell them apart."""
        return self.scores | {f"{name} loss": held_out for name, held_out in self.losses.items()}

    @property
    def arms(self) -> tuple[str, ...]:
        """The base, then the variants."""
        return (BASE, *self.variants)

    @model_validator(mode="after")
    def _check(self) -> AblationSettings:
        if BASE in self.variants:
            raise ValueError(f"no variant can be called {BASE}")
        if not self.metrics:
            raise ValueError("give scores or losses: something must be measured")
        if self.llm is None and self.toy_data is None:
            raise ValueError("give an llm, or toy_data for the quickstart's")
        for where, stages in (("stages", self.stages), *self.variants.items()):
            for stage, changes in stages.items():
                _check_known(where, "stage", stage, self.stages)
                if taken := set(_SET_BY_CHAIN) & (changes or {}).keys():
                    raise ValueError(f"{where}.{stage}.{min(taken)} is set by the chain: remove it")
        for name, held_out in self.metrics.items():
            if held_out.after is not None:
                _check_known(name, "stage", held_out.after, self.stages)
        if self.axis:
            for arm in self.arms:
                _check_known("axis.values", "value for", arm, self.axis.values)
        return self


@dataclass(frozen=True)
class Ablation:
    """An ablation that was read.

    Attributes:
        name: of its file.
        folder: of its file; recipes that it names are looked for there first.
        settings: as resolved.
    """

    name: str
    folder: Path
    settings: AblationSettings

    @classmethod
    def load(cls, name: str, overrides: Sequence[str] = (), **given: Any) -> Ablation:
        """Read a file, or an ablation of the package.

        Args:
            name: path of the file, or a name such as `no-stage1`.
            overrides: of the form `a.b=value`.
            **given: settings in place of the file's.

        Raises:
            SoloError: no such file, or a key or value that does not belong there.
        """
        path = _find(name)
        settings = override(read_settings(path, "ablation"), overrides) | given
        return cls(path.stem, path.parent, AblationSettings.parse(settings, origin=str(path)))


def list_ablations() -> dict[str, str]:
    """The ablations of the package: names and questions."""
    read = {path.stem: read_settings(path, "ablation") for path in list_settings(_FOLDER)}
    return {name: settings["question"] for name, settings in read.items() if "variants" in settings}


def describe(changes: Stages) -> list[str]:
    """What a variant changes, as `stage2.steps = 500` and `without stage1`."""
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
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"{where}: no {what} {name}" + (f"; did you mean {near[0]}?" if near else ""))
