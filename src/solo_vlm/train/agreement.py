"""What all processes of a run must have in common: settings and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solo_vlm.data.sources import Source, fingerprints
from solo_vlm.train.parallel.processes import Processes
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError

_LISTED = 3


def check_same_settings(recipe: Recipe, processes: Processes) -> None:
    """Refuse a process that was started with other settings than the first one.

    Raises:
        SoloError: naming the settings.
    """
    ours = recipe.model_dump(mode="json", exclude={"root"})  # files may lie elsewhere on another machine
    theirs = processes.decide(lambda: ours)
    if changed := changes(theirs, ours):
        raise SoloError(
            f"process {processes.rank} was started with other settings than process 0 "
            f"({describe(changed)}): give all the same recipe"
        )


def check_same_data(sources: Sequence[Source], processes: Processes) -> None:
    """Refuse a process that sees other files than the first one: it would read other samples.

    Raises:
        SoloError: naming the source.
    """
    ours = fingerprints(sources)
    for (name, first), (_, own) in zip(processes.decide(lambda: ours), ours, strict=True):
        if first != own:
            raise SoloError(
                f"process {processes.rank} sees other files of source {name} than process 0: give all "
                "machines the same files"
            )


def changes(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as `a.b` or `a[0].b`, with their values before and now."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in [*before, *(name for name in now if name not in before)]:
            found |= changes(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return {
            name: values
            for place, pair in enumerate(zip(before, now, strict=True))
            for name, values in changes(*pair, f"{key}[{place}]").items()
        }
    return {} if before == now else {key: (before, now)}


def describe(changed: dict[str, tuple[Any, Any]]) -> str:
    """Changed settings in words, the first few of them."""
    listed = [f"{key} was {before}, now {now}" for key, (before, now) in changed.items()]
    more = len(listed) - _LISTED
    return "; ".join(listed[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
