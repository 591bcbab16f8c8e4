"""Inference benchmark: equal questions, decoders and answers in all variants."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from answering import compiled, prefix, speed
from answering.models import Setting
from tests.factories import ROOT

SCRIPT = ROOT / "benchmarks" / "inference.py"


@pytest.fixture(scope="module")
def setting():
    return Setting("smollm2-135m", torch.device("cpu"), torch.float32, (64, 128), (2,), 1, (3,), tiny=True)


def test_answers_with_and_without_prefix_cache_agree(setting):
    results = prefix.measure(setting)
    assert results["prefix_same_answers"]
    assert results["prefix"]["questions"] == 10
    (one,) = results["prefix"]["by_answer_tokens"].values()
    assert results["prefix_speedup"] == pytest.approx(one["seconds_without"] / one["seconds_with"])


def test_compiled_answers_agree(setting):
    results = compiled.measure(setting)
    assert results["compiled"]["same_answers"]
    assert results["compile_speedup"] > 0


def test_solo_and_llava_get_the_same_question(setting):
    solo = setting.solo()
    chats = {"64": solo.encode([[speed.user_turn(speed.QUESTION, [speed.photograph(64, 64)])]] * 2)}
    llava = speed._for_llava(setting, solo, chats)
    vision = np.array(solo.model.config.vision_token_ids)
    ours, theirs = chats["64"]["input_ids"].numpy(), llava["input_ids"].numpy()
    assert np.array_equal(ours[~np.isin(ours, vision)], theirs[~np.isin(theirs, vision)])
    assert (theirs == solo.model.config.image_token_id).sum() == 2 * setting.clip.patches
    assert setting.llava()(**llava).logits.shape[:2] == theirs.shape


def test_decoders_are_equal(setting):
    solo, llava = setting.solo().model, setting.llava()
    counts = [
        sum(weight.numel() for weight in model.model.language_model.parameters()) for model in (solo, llava)
    ]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_script_prints_its_results(tmp_path):
    out = tmp_path / "out.json"
    options = ["--rounds", "1", "--sizes", "64", "128", "--batches", "1", "2", "--answers", "2", "--out", out]
    command = [sys.executable, SCRIPT, "--tiny", "--json", *options]
    results = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert results == json.loads(out.read_text())
    for value in (
        results["prefix_speedup"],
        results["compile_speedup"],
        *results["ttft_over_llava"].values(),
    ):
        assert math.isfinite(value) and value > 0
    assert results["decode_over_llava"].keys() == {"64", "128"}
