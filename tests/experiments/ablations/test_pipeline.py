"""Pipelines: stages and shared stages, data, initial models, and whole runs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from solo_vlm.data.sources import open_source
from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.experiments.ablations.pipeline import (
    all_stages,
    build_pipelines,
    prepare_data,
    shuffle_images,
    write_initial_model,
)
from solo_vlm.experiments.ablations.settings import Ablation
from solo_vlm.models.load import load_model, load_processor
from solo_vlm.quickstart.data.samples import pretraining_sample
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError


def by_variant(ablation, **options):
    """Return the pipelines of the first seed by variant."""
    pipelines = build_pipelines(ablation, **options)
    return {pipeline.variant: pipeline for pipeline in pipelines if pipeline.seed == 0}


def names(pipeline):
    return {name: stage and stage.run_name for name, stage in pipeline.outputs.items()}


def test_each_stage_starts_from_the_preceding_model(load):
    pipeline = by_variant(load())["base"]
    init, stage1, sft = pipeline.outputs.values()
    assert (init.source, stage1.source, sft.source) == (
        "tiny-llm",
        f"runs/{init.run_name}/model",
        f"runs/{stage1.run_name}/model",
    )
    for stage in (stage1, sft):
        assert stage.run.recipe.model == stage.source
        assert stage.run.folder == stage.folder
    assert pipeline.after(None) is sft
    assert pipeline.after("stage1") is stage1
    assert [stage.depth for stage in (init, stage1, sft)] == [0, 1, 2]


def test_another_image_in_a_folder_of_images_is_another_run(load, study):
    pictures = study / "root" / "data" / "pictures" / "red"
    pictures.mkdir(parents=True)
    ablation = load("stages.stage1.data.sources=[{path: data/pictures}]")
    runs = []
    for number in range(2):
        Image.new("RGB", (32, 32), "red").save(pictures / f"{number}.png")
        runs.append(names(by_variant(ablation)["base"]))
    assert runs[0]["init"] == runs[1]["init"]
    assert runs[0]["stage1"] != runs[1]["stage1"]


def test_variants_differ_only_in_their_changes(load):
    variants = by_variant(load())
    base, other = variants["base"].outputs["sft"].run.recipe, variants["no-stage1"].outputs["sft"].run.recipe
    same = {"model", "out", "steps"}
    assert base.model_dump(exclude=same) == other.model_dump(exclude=same)
    assert (base.steps, other.steps) == (3, 7)
    assert other.model == f"runs/{variants['base'].outputs['init'].run_name}/model"
    assert variants["no-stage1"].after("stage1") is variants["no-stage1"].outputs["init"]
    assert list(variants["no-stage1"].stages) == ["init", "sft"]


def test_variants_share_identical_stages(load):
    variants = by_variant(load("variants={rate: {sft: {optimizer: {learning_rate: 0.01}}}}"))
    base, rate = names(variants["base"]), names(variants["rate"])
    assert base["stage1"] == rate["stage1"]
    assert base["sft"] != rate["sft"]
    assert len(all_stages(list(variants.values()))) == 4


def test_logging_settings_do_not_change_the_run(load):
    assert names(by_variant(load())["base"]) == names(by_variant(load("stages.sft.log_interval=3"))["base"])


def test_changing_a_stage_changes_all_later_runs(load):
    before = names(by_variant(load())["base"])
    after = names(by_variant(load("stages.stage1.optimizer.learning_rate=0.1"))["base"])
    assert before["init"] == after["init"]
    assert before["stage1"] != after["stage1"]
    assert before["sft"] != after["sft"]


def test_changed_data_changes_the_runs_that_use_it(load, study):
    before = names(by_variant(load())["base"])
    write_samples(study / "root/data/sft.parquet", [pretraining_sample("red")] * 600)
    after = names(by_variant(load())["base"])
    assert before["stage1"] == after["stage1"]
    assert before["sft"] != after["sft"]


def test_seed_changes_weights_and_order_and_is_shared_by_variants(load):
    pipelines = build_pipelines(load("stages.sft.data.seed=5"))
    assert [(pipeline.variant, pipeline.seed) for pipeline in pipelines[:3]] == [
        ("base", 0),
        ("base", 1),
        ("from-scratch", 0),
    ]
    for pipeline in pipelines:
        recipe = pipeline.outputs["sft"].run.recipe
        assert (recipe.seed, recipe.data.seed) == (pipeline.seed, 5 + pipeline.seed)
        assert pipeline.outputs["init"].seed == pipeline.seed
    assert len({stage.run_name for stage in all_stages(pipelines)}) == len(all_stages(pipelines)) == 14


def test_fraction_scales_the_steps_of_all_stages(load):
    variants = by_variant(load(), fraction=0.5)
    assert variants["base"].outputs["stage1"].run.recipe.steps == 2
    assert variants["no-stage1"].outputs["sft"].run.recipe.steps == 4
    with pytest.raises(SoloError, match="base, stage stage1 has no steps"):
        build_pipelines(load("stages.stage1.steps=null"), fraction=0.5)


@pytest.mark.parametrize(("name", "stage"), [("study", "stage1"), ("design", "sft")])
def test_cifar10_studies_find_their_recipes(name, stage):
    pipeline = by_variant(Ablation.load(f"cifar10/{name}"))["base"]
    assert pipeline.outputs[stage].run.recipe.data.sources[0].path == "data/stage1.parquet"


def test_stage_can_name_a_packaged_recipe(study):
    plain = yaml.safe_load((study / "study.yaml").read_text())
    plain["stages"]["sft"] = {"recipe": "quickstart/sft"}
    (study / "study.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    pipeline = by_variant(Ablation.load(str(study / "study.yaml")))["base"]
    assert pipeline.outputs["sft"].run.recipe.steps == Recipe.load("quickstart/sft").steps


def rows(path):
    source = open_source(path)
    return [row for shard in range(len(source)) for row in source.read(shard)]


def pictures(row):
    return [image["bytes"] for image in row["images"]]


def test_shuffle_images_permutes_images_and_keeps_the_rest(tmp_path, picture):
    samples = [pretraining_sample(f"number {n}", picture(8, 8, seed=n)) for n in range(40)]
    samples += [pretraining_sample(f"text {n}") for n in range(5)]
    both = pretraining_sample("two", picture(8, 8, seed=50))
    both["messages"][0]["content"].insert(0, {"type": "image"})
    both["images"] += pretraining_sample("", picture(8, 8, seed=51))["images"]
    write_samples(tmp_path / "in.parquet", [*samples, both])
    shuffle_images(tmp_path / "in.parquet", tmp_path / "out.parquet")
    before, after = rows(tmp_path / "in.parquet"), rows(tmp_path / "out.parquet")
    assert [row["messages"] for row in before] == [row["messages"] for row in after]
    assert Counter(i for row in before for i in pictures(row)) == Counter(
        i for row in after for i in pictures(row)
    )
    assert [len(pictures(row)) for row in before] == [len(pictures(row)) for row in after]
    kept = sum(pictures(old) == pictures(new) for old, new in zip(before[:40], after[:40], strict=True))
    assert kept < 6  # one is expected to stay
    assert pictures(before[-1]) == pictures(after[-1])


def test_shuffle_images_is_deterministic_per_seed(tmp_path, picture):
    write_samples(tmp_path / "in.parquet", [pretraining_sample(f"{n}", picture(8, 8, n)) for n in range(20)])
    dealt = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        shuffle_images(tmp_path / "in.parquet", tmp_path / f"{name}.parquet", seed)
        dealt.append([pictures(row) for row in rows(tmp_path / f"{name}.parquet")])
    assert dealt[0] == dealt[1] != dealt[2]


def test_toy_data_is_written_once_and_rejects_other_settings(tmp_path):
    sizes = "{text: 20, stage1: 20, sft: 5, heldout_text: 4, heldout_digits: 2}"

    def prepare(drawn):
        prepare_data(Ablation.load("shuffled-labels", [f"root={tmp_path}", f"toy_data={drawn}"]).settings)

    prepare(sizes)
    data = tmp_path / "data"
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    files = ["heldout_digits", "heldout_text", "sft", "stage1", "stage1_shuffled", "text"]
    assert sorted(before) == [*(f"{name}.parquet" for name in files), "toy.json"]
    known = [row["messages"] for row in rows(data / "text.parquet")]
    assert all(row["messages"] not in known for row in rows(data / "heldout_text.parquet"))
    prepare(sizes)
    assert before == {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    with pytest.raises(SoloError, match="other toy data"):
        prepare(sizes.replace("20", "30"))


def started(load, *overrides, variant="base", seed=0):
    """Return the model and processor written by the stage `init`."""
    pipeline = next(c for c in build_pipelines(load(*overrides)) if (c.variant, c.seed) == (variant, seed))
    stage = pipeline.outputs["init"]
    if not stage.has_model:
        write_initial_model(stage)
    return load_model(stage.folder / "model"), load_processor(stage.folder / "model")


def layer(model):
    return model.model.language_model.layers[0].mlp.up_proj.weight


def test_init_keeps_llm_weights_and_applies_settings(load, study):
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(study / "root/tiny-llm")
    model, processor = started(load)
    assert torch.equal(layer(model), llm.model.layers[0].mlp.up_proj.weight)
    assert processor.image_processor.get_patch_grid(100, 300) == (2, 2)
    assert model.config.is_paper_design
    model, processor = started(load, "stages.init={image_attention: bidirectional}")
    assert model.config.image_attention == "bidirectional"
    assert processor.image_processor.get_patch_grid(100, 300) == (4, 10)


def test_init_from_scratch_draws_weights_from_the_seed(load):
    base, _ = started(load)
    first, _ = started(load, variant="from-scratch", seed=0)
    second, _ = started(load, variant="from-scratch", seed=1)
    assert first.config.text_config.to_dict() == base.config.text_config.to_dict()
    assert not torch.equal(layer(first), layer(base))
    assert not torch.equal(layer(first), layer(second))


def test_init_rejects_invalid_image_size(load):
    with pytest.raises(SoloError, match=r"init.image_size: .*multiples of 32"):
        started(load, "stages.init.image_size={height: 50, width: 50}")


def test_single_seed_is_rejected(run, study):
    status, _, err = run("ablate", study / "study.yaml", "seeds=1")
    assert status == 2
    assert "seeds: Input should be greater than or equal to 2" in err


def test_dry_run_reports_missing_runs(run, study):
    status, out, err = run("ablate", study / "study.yaml", "--dry-run", "--json")
    assert status == 0, err
    plan = json.loads(out)
    assert plan["missing"] == {"runs": 10, "steps": 2 * (4 + 3 + 4 + 3 + 7)}
    assert plan["variants"]["no-stage1"]["changes"] == ["without stage1", "sft.steps = 7"]
    assert [len(stage["runs"]) for stage in plan["variants"]["base"]["stages"].values()] == [2, 2, 2]
    status, out, _ = run("ablate", study / "study.yaml", "--dry-run")
    assert "to be trained: 10 runs, 42 steps" in out


def test_list_shows_packaged_ablations(run):
    _, out, _ = run("ablate", "--list", "--json")
    listed = json.loads(out)
    assert {"no-stage1", "shuffled-labels", "fixed-square", "text-share"} < set(listed)
    assert "base" not in listed
    assert all(question.endswith("?") for question in listed.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ablation_resumes_after_sigterm_and_writes_the_report(run, study):
    root = study / "root"
    command = [
        "ablate",
        str(study / "study.yaml"),
        "losses={names: data/heldout.parquet}",
        "--processes",
        "2",
    ]
    first = subprocess.Popen([sys.executable, "-m", "solo_vlm", *command], stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    line = next(line for line in first.stderr if line.startswith("stage1-") and ": done" in line)
    first.send_signal(signal.SIGTERM)
    first.stderr.read()
    assert first.wait() == 128 + signal.SIGTERM
    manifest = root / "runs" / line.split(":")[0] / "manifest.json"
    before = manifest.stat().st_mtime_ns

    status, out, err = run(*command, "--json")
    assert status == 0, err
    assert manifest.stat().st_mtime_ns == before
    report = json.loads(out)
    assert report["variants"]["no-stage1"]["steps"] == {"sft": 7}
    rows = pq.read_table(root / "study" / "results.parquet").to_pylist()
    assert len(rows) == 3 * 2 * 2
    assert len({row["value"] for row in rows if row["kind"] == "loss"}) == 6  # all variants and seeds differ
    assert {row["n"] for row in rows} == {7}
    for name in ("plot.png", "report.html", "report.json"):
        assert (root / "study" / name).is_file()

    for model in root.glob("runs/*/model"):
        shutil.rmtree(model)
    status, out, _ = run(*command, "--json")
    assert status == 0
    assert json.loads(out) == report
    assert not list(root.glob("runs/*/model"))
