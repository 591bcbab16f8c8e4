"""Measurements: stages and data, accuracy and loss."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import yaml

from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.evaluate.held_out import read_questions
from solo_vlm.experiments.ablations.measure import (
    answers_file,
    count_samples,
    measure_accuracy,
    measure_loss,
    plan_measurements,
)
from solo_vlm.experiments.ablations.pipeline import build_pipelines
from solo_vlm.quickstart.data.samples import chat_sample, pretraining_sample
from solo_vlm.utils.errors import SoloError


def test_measurements_follow_the_requested_stage_and_data(load, study):
    ablation = load()
    base, *_, without = build_pipelines(ablation)
    (found,) = plan_measurements(ablation.settings, [base])
    assert {metric: (m.kind, m.stage.name) for metric, m in found.items()} == {
        "names": ("accuracy", "sft"),
        "names loss": ("loss", "stage1"),
    }
    assert found["names"].file.parent == base.outputs["sft"].folder / "held_out"
    assert found["names"].result() is None
    found["names"].file.parent.mkdir(parents=True)
    found["names"].file.write_text('{"value": 0.5, "n": 7}')
    assert found["names"].result() == (0.5, 7)
    write_samples(study / "root/data/heldout.parquet", [chat_sample([("what is this?", "red")])])
    (found,) = plan_measurements(ablation.settings, [base])
    assert found["names"].result() is None
    with pytest.raises(SoloError, match="no-stage1: no stage trains before names loss"):
        plan_measurements(ablation.settings, [base, without])


class Parrot:
    """Fake pipeline that always gives the same answer and records the questions."""

    def __init__(self, answer):
        self.text, self.asked = answer, []

    def answer(self, chats, max_new_tokens):
        self.asked += [chat[-1]["content"][-1]["text"] for chat in chats]
        return [self.text] * len(chats)


def test_accuracy_is_the_share_of_correct_answers_and_resumes(tmp_path, picture):
    references = ["red", "blue", "Red ", "a red"] * 30
    asked = [
        chat_sample([(f"number {n}?", reference)], picture(8, 8)) for n, reference in enumerate(references)
    ]
    write_samples(tmp_path / "data.parquet", asked)
    file = answers_file(tmp_path / "result.json")
    parrot = Parrot("RED")
    assert measure_accuracy(parrot, tmp_path / "data.parquet", file) == (0.5, 120)
    assert parrot.asked == [f"number {n}?" for n in range(120)]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records[1] == {"question": "number 1?", "reference": "blue", "answer": "RED", "correct": False}

    file.write_text("".join(json.dumps(record) + "\n" for record in records[:100]))
    late = Parrot("blue")
    assert measure_accuracy(late, tmp_path / "data.parquet", file) == ((50 + 5) / 120, 120)
    assert late.asked == [f"number {n}?" for n in range(100, 120)]


def test_held_out_chat_without_question_is_rejected(tmp_path):
    write_samples(tmp_path / "data.parquet", [pretraining_sample("no question")])
    with pytest.raises(SoloError, match=r"data.parquet.*row 0: .*question and its answer"):
        read_questions(tmp_path / "data.parquet")


def test_loss_is_the_mean_over_supervised_tokens(tmp_path, solo, picture):
    """Packed as in the recipe, compared with every sample alone."""
    samples = [pretraining_sample("a red circle left of a blue square.") for _ in range(3)]
    samples += [pretraining_sample("seven", picture(64, 32, seed=n)) for n in range(4)]
    samples += [chat_sample([("what is this?", "hello world")], picture(32, 32))]
    write_samples(tmp_path / "data.parquet", samples)
    solo.save(tmp_path / "model")
    data = {"sources": [{"path": "none"}], "sequence_length": 48, "streams": 1, "vision_loss": True}
    recipe = {"model": "gone", "out": "gone", "precision": "fp32", "data": data, "lora": {"rank": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    total = supervised = 0.0
    encoder = Encoder(solo.processor)
    for sample in samples:
        document = encoder(parse_sample(sample))
        inputs = {
            "input_ids": torch.tensor(document.input_ids)[None],
            "pixel_values": torch.tensor(document.pixel_values) if len(document.pixel_values) else None,
            "image_grid_thw": torch.tensor(document.image_grid_thw) if len(document.pixel_values) else None,
        }
        with torch.no_grad():
            logits = solo.model(**inputs).logits[0, :-1]
        labels = torch.tensor(document.labels)[1:]
        total += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        supervised += (labels >= 0).sum().item()
    value, n = measure_loss(tmp_path, str(tmp_path / "data.parquet"))
    assert value == pytest.approx(total / supervised, rel=1e-4)
    assert n == count_samples(tmp_path / "data.parquet") == 8
