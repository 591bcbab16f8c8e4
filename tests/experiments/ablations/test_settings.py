"""Settings of ablations: validation, names, and the ablations of the package."""

from __future__ import annotations

import pytest

from solo_vlm.experiments.ablations.pipeline import build_pipelines
from solo_vlm.experiments.ablations.settings import Ablation, describe_changes, list_ablations
from solo_vlm.utils.errors import SoloError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.step=3", "base, stage sft: unknown key step; did you mean steps"),
        ("stages.init.from_scrach=true", "unknown key from_scrach; did you mean from_scratch"),
        ("stages.sft.recipe=none/such", "no recipe none/such"),
        ("variants.other.stage2.steps=3", "other: no stage stage2; did you mean stage1"),
        ("variants.base.sft.steps=3", "no variant can be called base"),
        ("stages.sft.model=elsewhere", "stages.sft.model is set by the pipeline"),
        ("losses.names.after=stag1", "names loss: no stage stag1; did you mean stage1"),
        ("losses.names.afer=stage1", "unknown key losses.names.afer; did you mean after"),
        ("axis={label: x, values: {base: 1}}", "no value for from-scratch"),
        ("llm=null", "toy_data"),
        ("varants=3", "did you mean variants"),
    ],
)
def test_invalid_settings_are_rejected(load, override, message):
    with pytest.raises(SoloError, match=message):
        build_pipelines(load(override))


def test_ablation_without_metrics_is_rejected(load):
    with pytest.raises(SoloError, match="scores or losses"):
        load("scores={}", "losses={}")


def test_factors_become_all_combinations(load):
    settings = load(
        "variants=null", "factors={a: {init: {from_scratch: true}}, b: {sft: {steps: 3}}}"
    ).settings
    both = {"init": {"from_scratch": True}, "sft": {"steps": 3}}
    assert settings.variants == {"a": {"init": both["init"]}, "b": {"sft": both["sft"]}, "a + b": both}
    with pytest.raises(SoloError, match="variants or factors, not both"):
        load("factors={a: {sft: {steps: 3}}}")


def test_describe_changes():
    changes = {"stage1": None, "sft": {"steps": 7, "data": {"vision_loss": True}}}
    assert describe_changes(changes) == ["without stage1", "sft.steps = 7", "sft.data.vision_loss = true"]


def test_unknown_ablation_lists_the_known_ones():
    with pytest.raises(SoloError, match=r"no ablation no-stage9.* bidirectional, .*no-stage1"):
        Ablation.load("no-stage9")


@pytest.mark.parametrize("name", list_ablations())
def test_packaged_ablations_change_at_most_two_settings(name):
    ablation = Ablation.load(name)
    variants = {pipeline.variant: pipeline for pipeline in build_pipelines(ablation)}
    for variant, changes in ablation.settings.variants.items():
        if ablation.settings.factors:
            assert set(variant.split(" + ")) <= set(ablation.settings.factors)
            continue
        kinds = {line.partition(".")[2] or line for line in describe_changes(changes)}
        assert len({kind.split(" = ")[0] for kind in kinds}) <= 2, kinds
        steps = [
            sum(stage.run.recipe.steps for stage in variants[compared].stages.values() if stage.run)
            for compared in ("base", variant)
        ]
        if name != "from-scratch":
            assert steps[0] == steps[1]
        assert variants[variant].outputs["sft"].run_name != variants["base"].outputs["sft"].run_name
