"""Training step benchmark: equal samples, losses and results in all variants."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tests.factories import ROOT
from training import seven_b
from training.machine import one_sharded_process
from training.variants import FULL_LOGITS, LLAVA, NAMES, OURS, PADDED, make_variants
from training.workload import Workload

from solo_vlm.train.parallel.context import init_distributed

SCRIPT = ROOT / "benchmarks" / "train_step.py"


@pytest.fixture(scope="module")
def workload():
    return Workload.of_tiny()


def losses(workload, start) -> dict[str, list[float]]:
    """Return the losses of two steps of each variant, each with its own model and optimizer."""
    recipe = workload.recipe(precision="fp32")
    with start(recipe) as context:
        found = {}
        for name in NAMES:
            variant = make_variants([name], workload, recipe, context)[name]
            variant.prepare()
            found[name] = [variant.step(recipe, context) for _ in range(2)]
        return found


@pytest.mark.parametrize("start", [init_distributed, one_sharded_process])
def test_all_solo_variants_have_the_same_losses(workload, start):
    found = losses(workload, start)
    assert found[PADDED] == pytest.approx(found[OURS], rel=1e-4)
    assert found[FULL_LOGITS] == pytest.approx(found[OURS], rel=1e-4)
    assert found[OURS][1] < found[OURS][0]
    assert found[LLAVA][1] < found[LLAVA][0]


def test_llava_gets_the_same_captions(workload):
    recipe = workload.recipe()
    with init_distributed(recipe) as context:
        variants = make_variants(NAMES, workload, recipe, context)
    images, documents = workload.draw()
    vision = variants[OURS].model.config.vision_token_ids
    llava = variants[LLAVA]
    rows = [
        row
        for batch in llava.batches
        for row in zip(*map(batch.get, ("input_ids", "labels", "attention_mask")), strict=True)
    ]
    assert sum(len(batch["squares"]) for batch in llava.batches) == len(rows) == len(images)
    for document, (ids, labels, mask) in zip(documents, rows, strict=True):
        ids, labels = ids[mask.bool()].numpy(), labels[mask.bool()].numpy()
        image = ids == vision[0]
        assert image.sum() == 16  # 4 x 4 patches of the tiny encoder
        assert np.array_equal(ids[~image], document.input_ids[~np.isin(document.input_ids, vision)])
        assert np.array_equal(labels[labels >= 0], document.labels[document.labels >= 0])
    trained = {
        name.split(".")[1] for name, weight in llava.model.model.named_parameters() if weight.requires_grad
    }
    assert trained == {"language_model", "multi_modal_projector"}


def test_packed_sequence_is_full(workload):
    documents = workload.sequence()
    assert sum(map(len, documents)) == workload.length
    assert all(len(document.pixel_values) for document in documents[:-1])


def test_estimated_padding_matches_sampled_batches(workload):
    many = replace(workload, samples=300)
    lengths = np.array([len(document) for document in many.draw()[1]]).reshape(-1, workload.rows)
    drawn = 1 - lengths.sum() / (lengths.max(axis=1).sum() * workload.rows)
    assert workload.of_many_batches()["padding_share_of_many_batches"] == pytest.approx(drawn, abs=0.05)


def test_layers_of_the_7b_model_train(workload, monkeypatch):
    monkeypatch.setattr(seven_b, "init_distributed", one_sharded_process)
    settings = {"activation_checkpointing": "selective"}
    metrics = seven_b._train(workload, settings, layers=2, warmup=0, steps=1)
    assert metrics["layers"] == 2
    assert metrics["tokens_per_second"] == pytest.approx(workload.length / metrics["step_seconds"])


@pytest.mark.slow
def test_script_prints_its_results(tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    command = [sys.executable, SCRIPT, "--tiny", "--json", "--out", out, "--plot", plot]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    metrics = json.loads(printed)
    for name in (
        "tokens_per_second",
        "speedup_over_padded",
        "speedup_over_full_logits",
        "samples_per_second_over_llava",
        "loss_memory_ratio",
    ):
        assert math.isfinite(metrics[name]) and metrics[name] > 0, name
    assert metrics == json.loads(out.read_text())
    assert metrics["seven_b"]["full"]["tokens_per_second"] > 0
    assert plot.read_text().count("</svg>") == 1
