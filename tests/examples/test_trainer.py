"""transformers' Trainer matches `solo train`, resumes exactly, and isolates documents."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from tests.factories import ROOT, ask
from transformers import TrainingArguments

from solo_vlm.data.mixture import make_loader
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.load import load_model, load_processor
from solo_vlm.train import Recipe, train
from solo_vlm.train.optimizer import make_optimizer
from trainer import PackedTrainer, main

STEPS, BATCH, RATE = 6, 2, 3e-3


def make_recipe(folder: Path, out: Path) -> Recipe:
    settings = {
        "out": str(out),
        "steps": STEPS,
        "global_batch": BATCH,
        "precision": "fp32",
        "log_interval": 1,
        "optimizer": {"learning_rate": RATE, "min_learning_rate": RATE, "warmup_steps": 0},
    }
    return Recipe.parse({**yaml.safe_load((folder / "mixture.yaml").read_text()), **settings})


def make_trainer(recipe: Recipe, out: Path, kind: type[PackedTrainer] = PackedTrainer) -> PackedTrainer:
    """Make the example's trainer with the optimizer of `solo train` and a constant rate."""
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=BATCH,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        ignore_data_skip=True,
        report_to="none",
    )
    loader = make_loader(
        recipe.mixture, load_processor(recipe.mixture.model_source()), recipe.mixture.open_sources()
    )
    model = load_model(recipe.mixture.model_source(), dtype="float32")
    return kind(loader, model=model, args=args, optimizers=(make_optimizer(model, recipe.optimizer), None))


def losses(trainer: PackedTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_losses_match_solo_train_and_resume_is_exact(folder, tmp_path):
    recipe = make_recipe(folder, tmp_path / "engine")
    train(recipe)
    lines = (tmp_path / "engine" / "metrics.jsonl").read_text().splitlines()
    engine = [json.loads(line)["loss"] for line in lines]

    trainer = make_trainer(recipe, tmp_path / "trainer")
    trainer.train()
    assert losses(trainer) == pytest.approx(engine, rel=1e-4)
    assert engine[-1] < 0.9 * engine[0]

    again = make_trainer(recipe, tmp_path / "trainer")
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert losses(again) == losses(trainer)


def test_packed_documents_do_not_attend_to_each_other(folder, tmp_path):
    """Uses the defaults of Trainer and model, including cache and attention."""
    compared = []

    class Watching(PackedTrainer):
        def compute_loss(self, model, inputs, **options):
            with torch.no_grad():
                packed = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[
                    0
                ]
                bounds, used = inputs["cu_seq_lens_q"].tolist(), 0
                for start, end in pairwise(bounds):
                    ids = inputs["input_ids"][:, start:end]
                    patches = int((ids == model.config.image_token_id).sum())
                    alone = model(
                        input_ids=ids, pixel_values=inputs["pixel_values"][used : used + patches]
                    ).logits
                    used += patches
                    compared.append(torch.allclose(packed[start:end], alone[0], atol=1e-4))
            return super().compute_loss(model, inputs, **options)

    make_trainer(make_recipe(folder, tmp_path), tmp_path / "out", Watching).train()
    assert len(compared) > 2 * STEPS * BATCH  # several documents per sequence
    assert all(compared)


def test_example_runs_and_resumes(folder, tmp_path):
    for steps in (2, 4):
        main(folder / "model", str(folder / "mixture.yaml"), tmp_path / "out", steps, batch=1)
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    pipeline = GenerationPipeline.from_pretrained(tmp_path / "out" / "model")
    assert len(pipeline.answer([ask("hello")], max_new_tokens=3)) == 1


@pytest.mark.distributed
def test_two_processes_match_one(folder, tmp_path):
    curves = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), ROOT / "examples" / "trainer.py"),
            *("--model", folder / "model", "--data", folder / "mixture.yaml", "--out", out),
            *("--steps", "4", "--batch", str(4 // processes), "--learning-rate", str(RATE)),
        ]
        subprocess.run(command, check=True, timeout=300)
        state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
        curves.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
