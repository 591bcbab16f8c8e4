"""A training run as typed settings: read from YAML, with inheritance and `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from solo_vlm.errors import SoloError


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSettings(_Settings):
    """One source of a mixture: where it is, and its share."""

    path: str
    weight: PositiveFloat = 1.0


class DataSettings(_Settings):
    """What the model reads. Defaults: the paper's packing (sequences of 32,768 tokens).

    Attributes:
        sources: files, folders or glob patterns of .parquet or .jsonl, with their weights.
        sequence_length: tokens in a packed sequence.
        weigh: whether weights are shares of tokens or of samples.
        epochs: passes over each source; none: without end.
        streams: virtual streams; ranks and workers must divide them, and every source needs as many row
            groups.
        workers: processes a rank that read ahead; 0 reads in the training process.
        packing_buffer: documents to choose from when packing.
        max_skipped: fraction of samples that may be unusable before the run stops and lists them.
        seed: of the order.
    """

    sources: list[SourceSettings] = Field(min_length=1)
    sequence_length: PositiveInt = 32768
    weigh: Literal["samples", "tokens"] = "tokens"
    epochs: PositiveInt | None = None
    streams: PositiveInt = 64
    workers: int = Field(0, ge=0)
    packing_buffer: PositiveInt = 128
    max_skipped: float = Field(0.01, ge=0, le=1)
    seed: int = 0


class OptimizerSettings(_Settings):
    """AdamW and its schedule. Defaults: the paper's pre-training.

    Attributes:
        learning_rate: peak, after the warm-up.
        patch_learning_rate: peak of the patch embedding, where it shall differ (small decoders need less).
        min_learning_rate: at the end of the cosine.
        warmup_steps: of linear growth.
        weight_decay: of matrices; norms and biases are not decayed.
        betas: of Adam.
        eps: of Adam.
        max_grad_norm: the gradient is clipped to.
    """

    learning_rate: PositiveFloat = 5e-5
    patch_learning_rate: PositiveFloat | None = None
    min_learning_rate: float = Field(5e-6, ge=0)
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0


class CheckpointSettings(_Settings):
    """How often the run is saved and how many of the newest checkpoints stay."""

    every: PositiveInt = 500
    keep: PositiveInt = 2


class Recipe(_Settings):
    """One stage of training.

    Attributes:
        root: folder that the relative paths of the recipe count from.
        model: folder of the model to start from: a SOLO model, or a plain LLM to train on text alone.
        out: folder of the run; the trained model will be `out/model`.
        steps: optimizer steps.
        global_batch: packed sequences a step, over all processes.
        precision: "bf16" computes in bfloat16 over float32 weights, "fp32" in float32.
        gradient_checkpointing: recompute activations in the backward pass.
        log_every: steps between two lines of metrics.
        seed: of everything that is random outside of the data.
    """

    root: str = "."
    model: str
    out: str
    data: DataSettings
    steps: PositiveInt
    global_batch: PositiveInt = 128
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    log_every: PositiveInt = 10
    seed: int = 0
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    def at(self, path: str) -> Path:
        """A path of the recipe, counted from its root; an absolute one stays."""
        return Path(self.root) / path

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe. `base: other.yaml` inherits from a file beside it; overrides are `a.b=value`.

        A recipe of the package can be named without its folder, as in `quickstart/stage1`.

        Raises:
            SoloError: no such file, or a key or value that does not belong in a recipe.
        """
        return cls.parse(_override(_read(find_recipe(path)), overrides), origin=str(path))

    def override(self, overrides: Sequence[str]) -> Recipe:
        """This recipe with `a.b=value` overrides.

        Raises:
            SoloError: as `load`.
        """
        return self.parse(_override(self.model_dump(mode="json"), overrides))

    @classmethod
    def parse(cls, settings: dict[str, Any], origin: str = "recipe") -> Recipe:
        """A recipe from plain settings.

        Raises:
            SoloError: naming the key, and the nearest right one where it is unknown.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise SoloError(f"{origin}: {_explain(error)}") from error


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: a path as given, or the name of one that comes with the package."""
    package = Path(__file__).parents[1]
    folders = [Path(), package / "recipes", package.parents[1] / "recipes"]
    for folder in folders:
        for candidate in (folder / path, folder / f"{path}.yaml"):
            if candidate.is_file():
                return candidate
    raise SoloError(f"no recipe {path}: give the path of a YAML file, or a name such as quickstart/stage1")


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise SoloError(f"cannot read recipe {path}: {error}") from error
    if not isinstance(settings, dict):
        raise SoloError(f"{path} is not a recipe: expected keys and values")
    base = settings.pop("base", None)
    return _merge(_read(path.parent / base), settings) if base else settings


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(settings: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise SoloError(f"override {override!r} is not of the form key=value")
        _set(settings, key, yaml.safe_load(value))
    return settings


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise SoloError(f"override {key}: {parent} is a single value, it has no {last}")
    settings[last] = value


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(step) for step in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg']}"
    near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(Recipe), n=1)
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")


def _known_keys(model: type[BaseModel]) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(name)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _known_keys(kind)
    return keys
