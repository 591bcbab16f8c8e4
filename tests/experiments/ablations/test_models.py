"""What chains start from, and what models are measured by."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import yaml

from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.data.samples_file import write_samples
from solo_vlm.evaluate.held_out import read_questions
from solo_vlm.experiments.ablations.chain import make_chains
from solo_vlm.experiments.ablations.measure import answers_file, count_samples, measurements
from solo_vlm.experiments.ablations.start import write_start
from solo_vlm.experiments.ablations.worker import answered_rightly, held_out_loss
from solo_vlm.models.load import load_model, load_processor
from solo_vlm.quickstart.data.samples import chat_sample, pretraining_sample
from solo_vlm.utils.errors import SoloError


def started(load, *overrides, arm="base", seed=0):
    """The model that a chain's `init` writes, and its processor."""
    chain = next(c for c in make_chains(load(*overrides)) if (c.arm, c.seed) == (arm, seed))
    link = chain.links["init"]
    if not link.ready:
        write_start(link)
    return load_model(link.folder / "model"), load_processor(link.folder / "model")


def layer(model):
    return model.model.language_model.layers[0].mlp.up_proj.weight


def test_init_keeps_the_llm_and_sets_what_it_is_told(load, study):
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(study / "root/tiny-llm")
    model, processor = started(load)
    assert torch.equal(layer(model), llm.model.layers[0].mlp.up_proj.weight)
    assert processor.image_processor.get_patch_grid(100, 300) == (2, 2)
    assert not model.config.bidirectional_images
    model, processor = started(load, "stages.init={bidirectional_images: true}")
    assert model.config.bidirectional_images
    assert processor.image_processor.get_patch_grid(100, 300) == (4, 10)


def test_from_scratch_is_the_same_model_with_weights_of_the_seed(load):
    base, _ = started(load)
    first, _ = started(load, arm="from-scratch", seed=0)
    second, _ = started(load, arm="from-scratch", seed=1)
    assert first.config.text_config.to_dict() == base.config.text_config.to_dict()
    assert not torch.equal(layer(first), layer(base))
    assert not torch.equal(layer(first), layer(second))


def test_sizes_that_are_none_are_refused(load):
    with pytest.raises(SoloError, match=r"init.image_size: .*multiples of 32"):
        started(load, "stages.init.image_size={height: 50, width: 50}")


def test_models_are_measured_where_they_are_told_to_be(load, study):
    ablation = load()
    base, *_, without = make_chains(ablation)
    (found,) = measurements(ablation.settings, [base])
    assert {metric: (m.kind, m.link.stage) for metric, m in found.items()} == {
        "names": ("accuracy", "sft"),
        "names loss": ("loss", "stage1"),
    }
    assert found["names"].file.parent == base.links["sft"].folder / "held_out"
    assert found["names"].result() is None
    found["names"].file.parent.mkdir(parents=True)
    found["names"].file.write_text('{"value": 0.5, "n": 7}')
    assert found["names"].result() == (0.5, 7)
    write_samples(study / "root/data/heldout.parquet", [chat_sample([("what is this?", "red")])])
    (found,) = measurements(ablation.settings, [base])
    assert found["names"].result() is None
    with pytest.raises(SoloError, match="no-stage1: no stage has trained anything where names loss"):
        measurements(ablation.settings, [base, without])


class Parrot:
    """Always gives the same answer, and counts what it is asked."""

    def __init__(self, answer):
        self.text, self.asked = answer, []

    def answer(self, chats, max_new_tokens):
        self.asked += [chat[-1]["content"][-1]["text"] for chat in chats]
        return [self.text] * len(chats)


def test_accuracy_is_the_share_of_right_answers_and_goes_on_where_it_stopped(tmp_path, picture):
    truths = ["red", "blue", "Red ", "a red"] * 30
    asked = [chat_sample([(f"number {n}?", truth)], picture(8, 8)) for n, truth in enumerate(truths)]
    write_samples(tmp_path / "data.parquet", asked)
    file = answers_file(tmp_path / "result.json")
    parrot = Parrot("RED")
    assert answered_rightly(parrot, tmp_path / "data.parquet", file) == (0.5, 120)
    assert parrot.asked == [f"number {n}?" for n in range(120)]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records[1] == {"question": "number 1?", "reference": "blue", "answer": "RED", "correct": False}

    file.write_text("".join(json.dumps(record) + "\n" for record in records[:100]))
    late = Parrot("blue")
    assert answered_rightly(late, tmp_path / "data.parquet", file) == ((50 + 5) / 120, 120)
    assert late.asked == [f"number {n}?" for n in range(100, 120)]


def test_a_held_out_chat_has_a_question_and_an_answer(tmp_path):
    write_samples(tmp_path / "data.parquet", [pretraining_sample("no question")])
    with pytest.raises(SoloError, match=r"data.parquet.*row 0: .*question and its answer"):
        read_questions(tmp_path / "data.parquet")


def test_loss_is_the_mean_over_what_samples_say(tmp_path, solo, picture):
    """Packed as the recipe says, against every sample by itself."""
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
            "pixel_values": torch.tensor(document.patches) if len(document.patches) else None,
            "image_grid_thw": torch.tensor(document.grids) if len(document.patches) else None,
        }
        with torch.no_grad():
            logits = solo.model(**inputs).logits[0, :-1]
        labels = torch.tensor(document.labels)[1:]
        total += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        supervised += (labels >= 0).sum().item()
    value, n = held_out_loss(tmp_path, str(tmp_path / "data.parquet"))
    assert value == pytest.approx(total / supervised, rel=1e-4)
    assert n == count_samples(tmp_path / "data.parquet") == 8
