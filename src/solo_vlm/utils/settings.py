"""Settings as typed, nested classes: read from YAML, with inheritance and `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from solo_vlm.utils.errors import SoloError


class Settings(BaseModel):
    """Base of all settings: an unknown key is an error, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, settings: dict[str, Any], origin: str = "settings") -> Self:
        """Typed settings from plain ones.

        Raises:
            SoloError: naming the key, and the nearest right one where it is unknown.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise SoloError(f"{origin}: {_explain(error, cls)}") from error

    def override(self, overrides: Sequence[str]) -> Self:
        """These settings with `a.b=value` overrides.

        Raises:
            SoloError: as `parse`.
        """
        return self.parse(override(self.model_dump(mode="json"), overrides))


def find_settings(path: str | Path, kind: str) -> Path:
    """The file of a recipe or mixture: a path as given, or the name of one that comes with the package.

    Raises:
        SoloError: there is none; `kind` says of what.
    """
    for folder in (Path(), *_recipes()):
        for candidate in (folder / path, folder / f"{path}.yaml"):
            if candidate.is_file():
                return candidate
    raise SoloError(f"no {kind} {path}: give the path of a YAML file, or a name such as quickstart/stage1")


def list_settings(folder: str) -> list[Path]:
    """The YAML files that a folder of the package's recipes has, in order of their names."""
    return sorted(path for recipes in _recipes() for path in (recipes / folder).glob("*.yaml"))


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """Plain settings of a YAML file, over those of the file that its `base` names.

    Raises:
        SoloError: the file cannot be read, or holds no settings.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise SoloError(f"cannot read {kind} {path}: {error}") from error
    if not isinstance(settings, dict):
        raise SoloError(f"{path} is not a {kind}: expected keys and values")
    base = settings.pop("base", None)
    return merge(read_settings(path.parent / base, kind), settings) if base else settings


def override(settings: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Put each `a.b=value` into plain settings.

    Raises:
        SoloError: an override is not of that form, or goes below a single value.
    """
    for change in overrides:
        key, equals, value = change.partition("=")
        if not equals:
            raise SoloError(f"override {change!r} is not of the form key=value")
        _set(settings, key, yaml.safe_load(value))
    return settings


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Plain settings over others, key by key; what is no dict is replaced as a whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _recipes() -> list[Path]:
    """Where the package's recipes are: inside of it once it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return [package / "recipes", package.parents[1] / "recipes"]


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            raise SoloError(f"override {key}: {parent} is a single value, it has no {last}")
    settings[last] = value


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(step) for step in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg']}"
    near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(kind), n=1)
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")


def _known_keys(kind: type[BaseModel]) -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(name)
        for part in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += _known_keys(part)
    return keys
