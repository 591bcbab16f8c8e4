"""Reading and comparison of settings."""

from __future__ import annotations

import pytest

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import describe_changes, find_changes, override, parse_yaml, read_settings


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


def test_key_that_occurs_twice_is_refused(tmp_path):
    recipe = tmp_path / "x.yaml"
    recipe.write_text("steps: 9\ndata: {sources: [{path: a}]}\nmodel: m\ndata: {epochs: 1}\n")
    with pytest.raises(SoloError, match=r"recipe .*x\.yaml: the key data occurs twice, again in line 4$"):
        read_settings(recipe, "recipe")
    with pytest.raises(SoloError, match="the key a occurs twice"):
        parse_yaml("[{a: 1, b: {c: 1}, a: 2}]", "x")
    shared = "b: &b {x: 1, y: 2}\nc: &c {<<: *b, x: 3}\nd: {<<: *c, y: 4}\n"
    assert parse_yaml(shared, "x")["d"] == {"x": 3, "y": 4}


def test_settings_that_are_no_yaml_are_one_line(tmp_path):
    recipe = tmp_path / "x.yaml"
    recipe.write_text("steps: [1\ndata: 2\n")
    for read in (lambda: read_settings(recipe, "recipe"), lambda: override({}, ["data.sources=[{path: a"])):
        with pytest.raises(SoloError, match=r"^cannot read .+$") as error:
            read()
        assert "\n" not in str(error.value)
