"""Which models an ablation is made of, and which of them are one."""

from __future__ import annotations

import pytest
import yaml

from solo_vlm.data.samples_file import write_samples
from solo_vlm.experiments.ablations.chain import all_links, make_chains
from solo_vlm.experiments.ablations.settings import Ablation, describe, list_ablations
from solo_vlm.quickstart.data.samples import pretraining_sample
from solo_vlm.utils.errors import SoloError


def by_arm(ablation, **options):
    """Chains of the first seed."""
    return {chain.arm: chain for chain in make_chains(ablation, **options) if chain.seed == 0}


def names(chain):
    return {stage: link and link.name for stage, link in chain.links.items()}


def test_every_stage_starts_from_the_one_before(load):
    chain = by_arm(load())["base"]
    init, stage1, sft = chain.links.values()
    assert (init.source, stage1.source, sft.source) == (
        "tiny-llm",
        f"runs/{init.name}/model",
        f"runs/{stage1.name}/model",
    )
    for link in (stage1, sft):
        assert link.run.recipe.model == link.source
        assert link.run.folder == link.folder
    assert chain.after(None) is sft
    assert chain.after("stage1") is stage1
    assert [link.depth for link in (init, stage1, sft)] == [0, 1, 2]


def test_arms_differ_in_what_their_variant_changes_alone(load):
    arms = by_arm(load())
    base, other = arms["base"].links["sft"].run.recipe, arms["no-stage1"].links["sft"].run.recipe
    same = {"model", "out", "steps"}
    assert base.model_dump(exclude=same) == other.model_dump(exclude=same)
    assert (base.steps, other.steps) == (3, 7)
    assert other.model == f"runs/{arms['base'].links['init'].name}/model"
    assert arms["no-stage1"].after("stage1") is arms["no-stage1"].links["init"]
    assert list(arms["no-stage1"].stages) == ["init", "sft"]


def test_equal_beginnings_are_one_run(load):
    arms = by_arm(load("variants={rate: {sft: {optimizer: {learning_rate: 0.01}}}}"))
    base, rate = names(arms["base"]), names(arms["rate"])
    assert base["stage1"] == rate["stage1"]
    assert base["sft"] != rate["sft"]
    assert len(all_links(list(arms.values()))) == 4


def test_what_does_not_change_learning_makes_no_other_run(load):
    assert names(by_arm(load())["base"]) == names(by_arm(load("stages.sft.log_interval=3"))["base"])


def test_a_change_goes_down_the_chain(load):
    before = names(by_arm(load())["base"])
    after = names(by_arm(load("stages.stage1.optimizer.learning_rate=0.1"))["base"])
    assert before["init"] == after["init"]
    assert before["stage1"] != after["stage1"]
    assert before["sft"] != after["sft"]


def test_other_data_make_other_runs(load, study):
    before = names(by_arm(load())["base"])
    write_samples(study / "root/data/sft.parquet", [pretraining_sample("red")] * 600)
    after = names(by_arm(load())["base"])
    assert before["stage1"] == after["stage1"]
    assert before["sft"] != after["sft"]


def test_a_seed_changes_weights_and_orders_and_is_shared_by_the_arms(load):
    chains = make_chains(load("stages.sft.data.seed=5"))
    assert [(chain.arm, chain.seed) for chain in chains[:3]] == [
        ("base", 0),
        ("base", 1),
        ("from-scratch", 0),
    ]
    for chain in chains:
        recipe = chain.links["sft"].run.recipe
        assert (recipe.seed, recipe.data.seed) == (chain.seed, 5 + chain.seed)
        assert chain.links["init"].seed == chain.seed
    assert len({link.name for link in all_links(chains)}) == len(all_links(chains)) == 14


def test_a_fraction_is_taken_of_all_steps(load):
    arms = by_arm(load(), fraction=0.5)
    assert arms["base"].links["stage1"].run.recipe.steps == 2
    assert arms["no-stage1"].links["sft"].run.recipe.steps == 4
    with pytest.raises(SoloError, match="base, stage stage1 has no steps"):
        make_chains(load("stages.stage1.steps=null"), fraction=0.5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.sft.step=3", "base, stage sft: unknown key step; did you mean steps"),
        ("stages.init.from_scrach=true", "unknown key from_scrach; did you mean from_scratch"),
        ("stages.sft.recipe=none/such", "no recipe none/such"),
        ("variants.other.stage2.steps=3", "other: no stage stage2; did you mean stage1"),
        ("variants.base.sft.steps=3", "no variant can be called base"),
        ("stages.sft.model=elsewhere", "stages.sft.model is set by the chain"),
        ("losses.names.after=stag1", "names loss: no stage stag1; did you mean stage1"),
        ("losses.names.afer=stage1", "unknown key losses.names.afer; did you mean after"),
        ("axis={label: x, values: {base: 1}}", "no value for from-scratch"),
        ("llm=null", "toy_data"),
        ("varants=3", "did you mean variants"),
    ],
)
def test_settings_that_make_no_ablation_are_refused(load, override, says):
    with pytest.raises(SoloError, match=says):
        make_chains(load(override))


def test_something_must_be_measured(load):
    with pytest.raises(SoloError, match="scores or losses"):
        load("scores={}", "losses={}")


def test_changes_are_named():
    changes = {"stage1": None, "sft": {"steps": 7, "data": {"vision_loss": True}}}
    assert describe(changes) == ["without stage1", "sft.steps = 7", "sft.data.vision_loss = true"]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(SoloError, match=r"no ablation no-stage9.* bidirectional, .*no-stage1"):
        Ablation.load("no-stage9")


@pytest.mark.parametrize("name", list_ablations())
def test_every_ablation_of_the_package_changes_little(name):
    ablation = Ablation.load(name)
    arms = by_arm(ablation)
    for variant, changes in ablation.settings.variants.items():
        kinds = {line.partition(".")[2] or line for line in describe(changes)}
        assert len({kind.split(" = ")[0] for kind in kinds}) <= 2, kinds
        steps = [
            sum(link.run.recipe.steps for link in arms[arm].stages.values() if link.run)
            for arm in ("base", variant)
        ]
        if name != "from-scratch":
            assert steps[0] == steps[1]
        assert arms[variant].links["sft"].name != arms["base"].links["sft"].name


def test_the_study_of_cifar10_finds_its_recipes():
    chain = by_arm(Ablation.load("cifar10/study"))["base"]
    assert chain.links["stage1"].run.recipe.data.sources[0].path == "data/stage1.parquet"


def test_a_recipe_of_the_package_can_be_named(study):
    plain = yaml.safe_load((study / "study.yaml").read_text())
    plain["stages"]["sft"] = {"recipe": "quickstart/sft"}
    (study / "study.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    chain = by_arm(Ablation.load(str(study / "study.yaml")))["base"]
    assert chain.links["sft"].run.recipe.steps == 4000
