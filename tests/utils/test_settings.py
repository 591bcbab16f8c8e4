"""Comparison of settings."""

from __future__ import annotations

from solo_vlm.utils.settings import describe_changes, find_changes


def test_find_changes_returns_nested_keys():
    before = {"a": 1, "b": {"c": 2, "same": 0}, "d": [{"w": 1}, {"w": 2}], "e": None, "f": [1]}
    now = {"a": 1, "b": {"c": 3, "same": 0}, "d": [{"w": 1}, {"w": 5}], "e": {"r": 4}, "f": [1, 2]}
    assert find_changes(before, now) == {
        "b.c": (2, 3),
        "d[1].w": (2, 5),
        "e": (None, {"r": 4}),
        "f": ([1], [1, 2]),
    }
    assert find_changes(now, now) == {}


def test_describe_changes_lists_first_few():
    assert describe_changes({"seed": (0, 1)}) == "seed was 0, now 1"
    changed = dict.fromkeys("abcde", (0, 1))
    assert describe_changes(changed) == "a was 0, now 1; b was 0, now 1; c was 0, now 1; and 2 more"
