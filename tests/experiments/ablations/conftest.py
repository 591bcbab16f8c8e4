"""Fixtures of the ablation tests: a small ablation with its own LLM and data."""

from __future__ import annotations

import shutil

import pytest
import yaml
from PIL import Image
from tests.factories import make_llm

from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.experiments.ablations.settings import Ablation
from solo_vlm.quickstart.data.samples import chat_sample, pretraining_sample

NAMES = ("red", "blue", "green", "seven")
RECIPE = {
    "model": "any",
    "out": "any",
    "steps": 4,
    "global_batch": 1,
    "precision": "fp32",
    "trackers": [],
    "log_interval": 1,
    "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 0},
}
PACKING = {"sequence_length": 64, "streams": 2, "packing_buffer": 8}


@pytest.fixture(scope="session")
def study_files(tmp_path_factory):
    """Return a read-only folder with a small LLM, an ablation, its recipes and data."""
    folder = tmp_path_factory.mktemp("study")
    root = folder / "root"
    for part in make_llm("qwen3", seed=7):
        part.save_pretrained(root / "tiny-llm")
    pictures = [Image.new("RGB", (32 + 32 * (n % 2), 32), (n % 256, 0, 0)) for n in range(520)]
    named = [pretraining_sample(NAMES[n % 4], image) for n, image in enumerate(pictures)]
    asked = [chat_sample([("what is this?", NAMES[n % 4])], image) for n, image in enumerate(pictures)]
    for name, samples in {"stage1": named, "sft": asked, "heldout": asked[:7]}.items():
        write_samples(root / "data" / f"{name}.parquet", samples)
    for stage in ("stage1", "sft"):
        data = {**PACKING, "sources": [{"path": f"data/{stage}.parquet"}]}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump({**RECIPE, "data": data}))
    settings = {
        "root": "set by the fixture",
        "question": "Does it matter where a small model starts?",
        "llm": "tiny-llm",
        "stages": {
            "init": {"image_size": {"height": 64, "width": 64}},
            "stage1": {"recipe": "stage1"},
            "sft": {"recipe": "sft.yaml", "steps": 3},
        },
        "variants": {
            "from-scratch": {"init": {"from_scratch": True}},
            "no-stage1": {"stage1": None, "sft": {"steps": 7}},
        },
        "scores": {"names": "data/heldout.parquet"},
        "losses": {"names": {"data": "data/heldout.parquet", "after": "stage1"}},
        "seeds": 2,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


@pytest.fixture
def study(study_files, tmp_path):
    """Return a writable copy of `study_files`."""
    folder = shutil.copytree(study_files, tmp_path / "study")
    settings = (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(settings.replace("set by the fixture", str(folder / "root")))
    return folder


@pytest.fixture
def load(study):
    """Return a function that loads the study with overrides."""
    return lambda *overrides: Ablation.load(str(study / "study.yaml"), overrides)
