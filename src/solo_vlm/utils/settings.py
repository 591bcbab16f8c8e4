"""Typed, nested settings read from YAML, with inheritance and `key=value` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from solo_vlm.utils.errors import SoloError, did_you_mean


class Settings(BaseModel):
    """Base class of all settings; immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, settings: dict[str, Any], origin: str = "settings") -> Self:
        """Validate plain settings.

        Args:
            origin: File name for error messages.

        Raises:
            SoloError: Names the invalid key, and the closest known key for an unknown one.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise SoloError(f"{origin}: {_explain(error, cls)}") from error

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, which may inherit from the file named by its `base` key.

        Args:
            path: Path, or name of a recipe of the package such as `quickstart/stage1`.
            overrides: `a.b=value` each.

        Raises:
            SoloError: No such file, or an invalid key or value.
        """
        kind = cls.__name__.removesuffix("Settings").lower()
        settings = read_settings(find_settings(path, kind), kind)
        return cls.parse(override(settings, overrides), origin=str(path))

    def override(self, overrides: Sequence[str]) -> Self:
        """Return a copy with `a.b=value` overrides."""
        return self.parse(override(self.model_dump(mode="json"), overrides))


class _Loader(yaml.SafeLoader):
    """Loader that rejects a key that occurs twice in a mapping, of which PyYAML keeps the last value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value]
        for place, key in enumerate(keys):
            if key.value in (other.value for other in keys[:place]):
                raise yaml.YAMLError(
                    f"the key {key.value} occurs twice, again in line {key.start_mark.line + 1}"
                )
        return node


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML.

    Args:
        origin: Name of the text for error messages.

    Raises:
        SoloError: The text is no YAML, or a key occurs twice in a mapping.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SoloError(f"cannot read {origin}: {' '.join(str(error).split())}") from error


def find_settings(path: str | Path, kind: str, *folders: Path) -> Path:
    """Find a settings file by path, or by name in `folders` or among the recipes of the package.

    The name may lack `.yaml`; `kind` ("recipe", "mixture", ...) names the file in the error message.
    """
    if found := _find(path, [*folders, Path(), *_recipes()]):
        return found
    raise SoloError(f"no {kind} {path}: give the path of a YAML file, or a name such as quickstart/stage1")


def list_settings(folder: str) -> list[Path]:
    """List the YAML files of a subfolder of the package's recipes, sorted by name."""
    return sorted(path for recipes in _recipes() for path in (recipes / folder).glob("*.yaml"))


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """Read a YAML file as plain settings, merged over those of the file named by its `base` key.

    The base is a file relative to the first one, or a recipe of the package, such as `presets/lora`.
    """
    try:
        settings = parse_yaml(path.read_text(), f"{kind} {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise SoloError(f"cannot read {kind} {path}: {error}") from error
    if not isinstance(settings, dict):
        raise SoloError(f"{path} is not a {kind}: expected keys and values")
    base = settings.pop("base", None)
    if not base:
        return settings
    found = _find(base, [path.parent, *_recipes()])
    if found is None:
        raise SoloError(f"cannot read {kind} {path}: no base {base}, neither beside it nor in the package")
    return merge(read_settings(found, kind), settings)


def _find(path: str | Path, folders: Sequence[Path]) -> Path | None:
    """Find a settings file, whose name may lack `.yaml`, in the first folder that has it."""
    candidates = (folder / name for folder in folders for name in (path, f"{path}.yaml"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def override(settings: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set each `a.b=value` in plain settings, in place."""
    for change in overrides:
        key, equals, value = change.partition("=")
        if not equals:
            raise SoloError(f"override {change!r} is not of the form key=value")
        _set(settings, key, parse_yaml(value, change))
    return settings


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge plain settings recursively; anything but a dict is replaced as a whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def find_changes(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Compare plain settings; return `a.b` or `a[0].b` -> (value before, value now) where they differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in [*before, *(name for name in now if name not in before)]:
            found |= find_changes(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return {
            name: values
            for index, pair in enumerate(zip(before, now, strict=True))
            for name, values in find_changes(*pair, f"{key}[{index}]").items()
        }
    return {} if before == now else {key: (before, now)}


def describe_changes(changes: dict[str, tuple[Any, Any]], limit: int = 3) -> str:
    """Describe the first few of `find_changes`."""
    listed = [f"{key} was {before}, now {now}" for key, (before, now) in changes.items()]
    more = len(listed) - limit
    return "; ".join(listed[:limit]) + (f"; and {more} more" if more > 0 else "")


def _recipes() -> list[Path]:
    """Return the recipe folders: inside an installed package, or next to the package in a checkout."""
    package = Path(__file__).parents[1]
    return [package / "recipes", package.parents[1] / "recipes"]


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            raise SoloError(f"override {key}: {parent} is a single value, it has no key {last}")
    settings[last] = value


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(step) for step in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg']}" if key else first["msg"]
    *parents, name = map(str, first["loc"])
    beside = did_you_mean(name, kind.model_fields) if not parents else ""
    return f"unknown key {key}" + (beside or did_you_mean(name, _known_keys(kind)))


def _known_keys(kind: type[BaseModel]) -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(name)
        for part in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += _known_keys(part)
    return keys
