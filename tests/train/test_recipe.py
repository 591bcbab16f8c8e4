"""Recipes: inheritance, overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from solo_vlm.errors import SoloError
from solo_vlm.train.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def recipe(tmp_path):
    write(tmp_path, "base.yaml", "global_batch: 4\noptimizer: {learning_rate: 1.0e-3, warmup_steps: 5}\n")
    return write(
        tmp_path,
        "child.yaml",
        "base: base.yaml\nmodel: m\nout: o\nsteps: 7\noptimizer: {warmup_steps: 6}\n"
        "data: {sources: [{path: x.parquet}]}\n",
    )


def test_a_child_overrides_its_base_and_the_command_line_both(recipe):
    loaded = Recipe.load(recipe, ["steps=9", "data.sequence_length=128", "optimizer.betas=[0.8, 0.9]"])
    assert (loaded.global_batch, loaded.steps, loaded.data.sequence_length) == (4, 9, 128)
    assert (loaded.optimizer.learning_rate, loaded.optimizer.warmup_steps) == (1e-3, 6)
    assert loaded.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat; did you mean learning_rate"),
        ("stepz=1", "did you mean steps"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("steps=0", "steps"),
        ("precision=fp8", "precision"),
        ("steps", "not of the form key=value"),
        ("steps.more=1", "steps is a single value"),
        ("data.sources=[]", "data.sources"),
    ],
)
def test_a_wrong_setting_is_named(recipe, override, message):
    with pytest.raises(SoloError, match=message):
        Recipe.load(recipe, [override])


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "base: nowhere.yaml"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(SoloError):
        Recipe.load(write(tmp_path, "broken.yaml", text))


def test_a_missing_recipe_says_what_to_give():
    with pytest.raises(SoloError, match="no recipe nowhere"):
        Recipe.load("nowhere")


@pytest.mark.parametrize(
    "path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES))
)
def test_every_recipe_of_the_project_is_valid(path):
    if path.name != "base.yaml":
        Recipe.load(path)


def test_the_defaults_are_the_papers(recipe):
    """Pre-training of the SOLO paper, section 3: what a recipe does not say."""
    plain = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}}
    settings = Recipe.parse(plain)
    assert (settings.data.sequence_length, settings.global_batch) == (32_768, 128)
    optimizer = settings.optimizer
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps) == (5e-5, 5e-6, 200)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.1, 1.0)
