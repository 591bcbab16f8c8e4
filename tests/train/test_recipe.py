"""Recipes: inheritance, overrides, errors, and the paper's values."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tests.factories import ROOT

from solo_vlm.hub.card import catalog_entry
from solo_vlm.models.flops import count_parameters
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.train.estimate.memory import find_device
from solo_vlm.train.estimate.plan import make_plan
from solo_vlm.train.optimizer import learning_rate
from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.train.recipe import LoraSettings, Recipe
from solo_vlm.utils.errors import SoloError

RECIPES = ROOT / "recipes"


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


def test_overrides_beat_recipe_and_recipe_beats_base(recipe):
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
def test_invalid_setting_is_named(recipe, override, message):
    with pytest.raises(SoloError, match=message):
        Recipe.load(recipe, [override])


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "base: nowhere.yaml"])
def test_file_that_is_not_a_recipe_is_rejected(tmp_path, text):
    with pytest.raises(SoloError):
        Recipe.load(write(tmp_path, "broken.yaml", text))


def test_base_may_be_a_recipe_of_the_package(tmp_path):
    text = "base: presets/lora\nout: mine\ndata: {sources: [{path: chats.json, images: photos}]}"
    recipe = Recipe.load(write(tmp_path, "mine.yaml", text))
    assert recipe.out == "mine"
    assert recipe.lora == LoraSettings(rank=16, alpha=32)
    assert [source.path for source in recipe.data.sources] == ["chats.json"]
    with pytest.raises(
        SoloError, match=r"mine\.yaml: no base presets/lore, neither beside it nor in the package"
    ):
        Recipe.load(write(tmp_path, "mine.yaml", "base: presets/lore"))


def test_missing_recipe_error_says_what_to_pass():
    with pytest.raises(SoloError, match="no recipe nowhere"):
        Recipe.load("nowhere")


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in RECIPES.rglob("*.yaml")
        if path.parent.name not in ("sweeps", "ablations") and path.stem not in ("study", "design")
    ),
    ids=lambda path: str(path.relative_to(RECIPES)),
)
def test_packaged_recipes_are_valid(path):
    if path.name != "base.yaml":
        Recipe.load(path)


def test_defaults_are_those_of_the_paper(recipe):
    """Defaults equal the pre-training settings of the SOLO paper, section 3."""
    plain = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}}
    settings = Recipe.parse(plain)
    assert (settings.data.sequence_length, settings.global_batch) == (32_768, 128)
    optimizer = settings.optimizer
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps) == (5e-5, 5e-6, 200)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.1, 1.0)


DECODER = json.loads((RECIPES / "smollm2-135m/config.json").read_text())
SHAPES = {
    "0.9B": {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 24,
             "num_attention_heads": 24, "num_key_value_heads": 8},
    "3.2B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
             "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128320},
    "7.2B": json.loads((RECIPES / "solo-7b/config.json").read_text())["text_config"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "shape", "overrides"),
    [
        ("full", "0.9B", ()),
        ("patches", "3.2B", ()),
        ("lora", "3.2B", ()),
        ("lora", "7.2B", ("quantize=nf4",)),
    ],
)
def test_presets_fit_one_gpu_of_24_gb(tmp_path, preset, shape, overrides):
    config = {**DECODER, "text_config": {**DECODER["text_config"], **SHAPES[shape]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = Recipe.load(f"presets/{preset}", [f"model={tmp_path}", "steps=100", *overrides])
    plan = make_plan(recipe, 1, find_device("RTX-4090"), 0.4)
    assert abs(plan.parameters.total / 1e9 - float(shape.removesuffix("B"))) < 0.1
    assert plan.fits


# The paper's Table 1: packed sequences of 32,768 tokens.
STAGES = {
    "stage1": (1525, {"imagenet-21k": 74_283, "slimpajama-stage1": 120_839}),
    "stage2": (
        3481,
        {
            "capfusion": 204_978,
            "websight": 71_579,
            "cc3m": 32_760,
            "detailed-captions": 6_225,
            "llavar": 3_602,
            "dvqa": 2_917,
            "ocr-vqa": 1_593,
            "figureqa": 1_526,
            "slimpajama-stage2": 120_385,
        },
    ),
    "stage3": (
        300,
        {
            "allava-laion": 13_725,
            "allava-vflan": 4_469,
            "llavar": 3_602,
            "dvqa": 2_917,
            "figureqa": 1_526,
            "slimpajama-stage3": 12_085,
        },
    ),
}


# The paper's fine-tuning data.
SAMPLES = {
    "codeact-general": 71_000,
    "ultrainteract": 288_000,
    "ultrachat": 207_000,
    "lvis-instruct4v": 223_000,
    "sharegpt4v": 102_000,
    "laion-gpt4v": 12_000,
    "localized-narratives": 200_000,
    "vsr": 2_000,
    "tqa": 2_000,
    "scienceqa": 5_000,
    "iconqa": 27_000,
    "tabmwp": 23_000,
    "chartqa": 18_000,
    "vistext": 7_000,
    "chart2text": 27_000,
    "dvqa-sft": 20_000,
    "figureqa-sft": 20_000,
    "diagram-image-to-text": 300,
    "infographicvqa": 2_000,
    "st-vqa": 17_000,
    "textcaps": 22_000,
    "textvqa": 22_000,
    "ocr-vqa-sft": 17_000,
    "rendered-text": 10_000,
    "hateful-memes": 8_500,
    "okvqa": 9_000,
    "aokvqa": 16_500,
    "tallyqa": 100_000,
    "visual7w": 14_000,
    "cocoqa": 46_000,
    "vqav2": 82_000,
    "gqa": 72_000,
}


@pytest.mark.parametrize("stage", STAGES)
def test_paper_pretraining_recipes(stage):
    recipe = Recipe.load(f"solo-7b/{stage}")
    steps, sequences = STAGES[stage]
    assert recipe.steps == steps
    assert weights(recipe) == sequences
    assert 0 <= steps * 128 - sum(sequences.values()) < 128  # one epoch
    assert (recipe.data.sequence_length, recipe.data.weight_by, recipe.global_batch) == (
        32_768,
        "sequences",
        128,
    )
    assert (recipe.precision, recipe.activation_checkpointing, recipe.parallel.tensor) == ("bf16", "auto", 2)
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps) == (5e-5, 5e-6, 200)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.1, 1.0)
    dims = ParallelDims.from_recipe(recipe, 8)
    assert (dims.dp, dims.gradient_accumulation_steps) == (4, 32)


def test_paper_finetuning_recipe():
    recipe = Recipe.load("solo-7b/sft")
    assert (recipe.global_batch, recipe.data.sequence_length) == (640, 4096)
    assert (recipe.steps, recipe.data.epochs) == (None, 1)
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.weight_decay) == (1e-5, 0.0, 0.1)
    assert optimizer.warmup_steps == 50
    assert ParallelDims.from_recipe(recipe, 8).gradient_accumulation_steps == 80
    assert weights(recipe) == SAMPLES


ALL_STAGES = ("stage1", "stage2", "stage3", "sft")


@pytest.mark.parametrize("model", ["solo-7b", "smollm2-135m", "solo-open", "solo-open/1.7b", "solo-open/7b"])
def test_each_stage_starts_from_previous_model(model):
    stages = [Recipe.load(f"{model}/{stage}") for stage in ALL_STAGES]
    for before, after in pairwise(stages):
        assert after.model == f"{before.out}/model"
        assert after.root == before.root
    assert all(catalog_entry(source.path) for stage in stages for source in stage.data.sources)


def test_small_recipe_fits_on_one_gpu():
    for stage in ("stage1", "stage2", "stage3", "sft"):
        recipe = Recipe.load(f"smollm2-135m/{stage}")
        plan = make_plan(recipe, 1, find_device("RTX-4090"), 0.4, RECIPES / "smollm2-135m")
        assert plan.fits
        assert plan.dims == ParallelDims(1, 1, 64)
        assert plan.parameters.total == 134_515_008 + 64 * 576 + 3072 * 576  # SmolLM2-135M and new parameters


@pytest.mark.parametrize(
    ("model", "device", "processes", "parameters"),
    [
        ("solo-open", "RTX-4090", 1, 134_515_008 + 64 * 576 + 3072 * 576),
        ("solo-open/1.7b", "A100-80GB", 1, 1_711_376_384 + 64 * 2048 + 3072 * 2048),
        ("solo-open/7b", "A100-80GB", 8, count_parameters(SoloConfig()).total),
    ],
)
def test_recipes_on_open_data_fit_and_plan_offline(run, model, device, processes, parameters):
    for stage in ALL_STAGES:
        command = ("train", f"{model}/{stage}", "--dry-run", "--device", device, "--processes", processes)
        code, out, error = run(*command, "--json")
        assert code == 0, error
        plan = json.loads(out)
        assert plan["fits"]
        assert plan["parameters"]["total"] == parameters
        recipe = Recipe.load(f"{model}/{stage}")
        assert recipe.data.streams % (plan["parallel"]["dp"] * recipe.data.workers) == 0
        assert sum(source.weight for source in recipe.data.sources) == 100


def weights(recipe: Recipe) -> dict[str, float]:
    """Return the weights by data set, named as its folder."""
    return {source.path.removeprefix("data/"): source.weight for source in recipe.data.sources}


def test_min_learning_rate_above_peak_is_rejected():
    plain = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}}
    message = "optimizer: min_learning_rate = 5e-06 is above learning_rate = 1e-06.*set min_learning_rate"
    with pytest.raises(SoloError, match=message):
        Recipe.parse({**plain, "optimizer": {"learning_rate": 1e-6}})
    constant = Recipe.parse({**plain, "optimizer": {"learning_rate": 5e-6, "warmup_steps": 0}})
    assert {learning_rate(step, 10, constant.optimizer) for step in range(10)} == {5e-6}
