"""Model card: it matches the runs and the evaluation, and reveals nothing about their machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from tests.factories import make_llm, make_solo

from solo_vlm.data.catalog.entry import DATA_SETS
from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.hub.card import TrainingRun, catalog_entry, public_name
from solo_vlm.models.from_llm import ImageDesign, compose
from solo_vlm.models.load import load_model
from solo_vlm.utils.errors import SoloError


def tables(text):
    """Return the rows of the card's tables by their first cell; later rows replace earlier ones."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="session")
def card(published):
    return ModelCard.load(published / "README.md")


def test_metadata(card):
    data = card.data
    assert (data.license, data.base_model) == ("apache-2.0", "owner/tiny-llm")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert data.datasets == [DATA_SETS["gqa"].source.split(":")[0]]
    (mme,) = data.eval_results  # the other score is partial
    assert (mme.dataset_type, mme.dataset_name, mme.metric_type) == (get("mme").hub_id, "MME", "score")
    assert mme.metric_value == 2800.0  # every answer of the test rows is correct


def test_scores_have_intervals_and_metrics(card, home):
    rows = tables(card.text)
    for score in RunFolder(home / "evaluation").read_scores():
        low, high = score.interval
        assert rows[score.name] == [
            f"{score.score:,.1f}",
            f"{score.maximum:,.0f}",
            f"{low:,.1f} to {high:,.1f}",
            f"{score.n:,}",
        ]
        assert f"**{score.title}**: {score.metric} ({score.source})" in card.text
    assert card.text.count("**Partial**") == 1
    assert "torch 1.2.3" in card.text


def test_training_facts_match_the_manifests(card, home):
    rows = tables(card.text)
    counts = [json.loads((home / run / "manifest.json").read_text())["outcome"] for run in ("stage1", "sft")]
    assert rows["optimizer steps"] == ["4", "4"]
    assert rows["tokens read"] == [f"{outcome['data']['tokens']:,}" for outcome in counts]
    assert rows["samples skipped"] == [str(outcome["data"].get("skipped", 0)) for outcome in counts]
    assert rows["learning rate"] == ["0.003 to 0.0001, cosine"] * 2
    assert rows["`gqa`"] == ["GQA", f"`{DATA_SETS['gqa'].source}`", DATA_SETS["gqa"].license]
    assert rows["`notes`"][0] == "75.0%"
    assert card.text.count("weights are shares of tokens") == 2


def test_skipped_samples_are_listed_per_source(home):
    counts = json.loads((home / "stage1/manifest.json").read_text())["outcome"]["data"]
    images, texts = TrainingRun.read(home / "stage1").sources
    assert counts["skipped"] > 0
    assert (sum(images.skipped.values()), texts.skipped) == (counts["skipped"], {})
    assert not any("/" in reason for reason in images.skipped)


def test_parameters_and_grid(card, home):
    rows, model = tables(card.text), load_model(home / "sft/model")
    patches = model.model.embed_vision_patch.weight.numel()
    assert rows["parameters"] == [f"{model.num_parameters():,}, of which {patches:,} embed patches"]
    assert rows["1024 x 768"] == ["24 x 32", str(24 * 32 + 24 + 1)]  # the paper's layout: R * C + R + 1


def test_published_files_name_nothing_of_this_machine(published, home):
    secret = home.name
    files = [file for file in published.rglob("*") if file.suffix != ".safetensors"]
    for file in files:
        text = file.read_text()
        assert secret not in text, file.name
        assert str(home.parent) not in text, file.name
    assert secret in (home / "sft/manifest.json").read_text()  # the run does name it
    config = json.loads((home / "sft/model/config.json").read_text())
    assert "_name_or_path" in config["text_config"]
    assert "_name_or_path" not in json.loads((published / "config.json").read_text())["text_config"]


def test_only_known_files_are_published(publication, tmp_path, home):
    secret = "alice-at-her-desk"
    model = tmp_path / "model"
    model.mkdir()
    for file in (home / "sft/model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["_name_or_path"] = f"/home/{secret}/llm"
    (model / "config.json").write_text(json.dumps(config))
    (model / "optimizer.pt").write_text("x")
    (model / "notes.txt").write_text(secret)
    (model / "README.md").write_text(secret)
    replace(publication, model=model).write(tmp_path / "out")
    assert not (tmp_path / "out/optimizer.pt").exists()
    assert not (tmp_path / "out/notes.txt").exists()
    for file in (tmp_path / "out").glob("*.*"):
        assert secret.encode() not in file.read_bytes(), file.name
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (model / weights).read_bytes()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/questions.parquet", "questions.parquet"),
        ("data/questions/*.parquet", "questions/*.parquet"),
        ("/home/alice/*.parquet", "*.parquet"),
        ("../alice/*.parquet", "*.parquet"),
        ("~/x.jsonl", "x.jsonl"),
        ("s3://alice:secret@bucket/a/x.parquet?token=secret", "x.parquet"),
        ("https://host/alice/*.tar", "*.tar"),
        ("/home/alice/data/vqav2/*.parquet", "vqav2"),
        ("data/slimpajama-stage2", "slimpajama"),
        ("data/dvqa-sft", "dvqa-sft"),
        ("hf://datasets/HuggingFaceM4/FineVision:chartqa/train", "finevision"),
        ("hf://datasets/HuggingFaceM4/the_cauldron:vqav2/train", "vqav2"),
        ("hf://datasets/alice/secret:default/train", "train"),
    ],
)
def test_public_names(path, name):
    assert public_name(path) == name
    assert (catalog_entry(path) is not None) == (name in DATA_SETS)


def test_unfinished_run_is_marked(home, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text((home / "sft/recipe.yaml").read_text())
    facts = TrainingRun.read(tmp_path / "run").facts()
    assert facts["optimizer steps"] == "4, not finished"
    assert "tokens read" not in facts
    with pytest.raises(SoloError, match=r"neither manifest\.json nor recipe\.yaml"):
        TrainingRun.read(tmp_path)


def test_card_without_runs_and_evaluation(publication, tmp_path):
    alone = replace(publication, runs=(), evaluation=None, license=None, base_model=None)
    alone.write(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.eval_results) == (None, None)
    assert "This card gives no evidence of quality." in card.text


def test_card_of_a_model_without_a_context_length_leaves_it_out(publication, tmp_path):
    make_solo("mamba").save(tmp_path / "model")
    alone = replace(publication, model=tmp_path / "model", runs=(), evaluation=None)
    alone.write(tmp_path / "out")
    assert "context length" not in ModelCard.load(tmp_path / "out/README.md").text


def test_card_counts_the_parameters_of_any_patch_embedding(publication, tmp_path):
    solo = compose(*make_llm(), design=ImageDesign(patch_embedding="conv"))
    solo.save(tmp_path / "model")
    replace(publication, model=tmp_path / "model", runs=(), evaluation=None).write(tmp_path / "out")
    own = sum(parameter.numel() for parameter in solo.model.model.embed_vision_patch.parameters())
    assert f"of which {own:,} embed patches" in ModelCard.load(tmp_path / "out/README.md").text


def test_scores_of_other_weights_are_rejected(publication, home, tmp_path, evaluate):
    evaluate(tmp_path / "other", home / "stage1/model")
    with pytest.raises(SoloError, match="another model"):
        replace(publication, evaluation=tmp_path / "other").write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
