"""Greedy answers while training: those of the exported model, without effect on the run, on any processes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tests.factories import COLORS, make_llm, read_steps, run_recipe, run_settings

from solo_vlm import SoloImageProcessor
from solo_vlm.evaluate.questions import Answer, QuestionSettings, load_questions
from solo_vlm.generate import BatchGenerator, GenerationPipeline, GenerationRequest
from solo_vlm.models.load import load_model
from solo_vlm.train import Recipe, train
from solo_vlm.utils.errors import SoloError


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Return a file of questions about colors; prompts and answers have several lengths."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(11):
        color = COLORS[number % 3]
        Image.new("RGB", (64, 32 * (1 + number % 2)), color).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what is this?" + " hello" * (number % 4)})
        rows[-1] |= {"answer": color}
    rows[3] |= {"options": ["red", "blue"], "answer": "red"}
    rows[4] = {"question": "what is seven?", "answer": 7}
    rows[5] |= {"metric": "anls", "answer": ["green", "a green square"]}
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "questions.jsonl"


def asking(questions, **changes):
    return {"validation": {"questions": str(questions), "interval": 4, "max_new_tokens": 8, **changes}}


def answers_of(out, step):
    records = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    return {
        record["id"]: (record["answer"], record["credit"]) for record in records if record["step"] == step
    }


def generated(model, questions, max_new_tokens=8):
    """Return the answers of a saved model, generated as by `solo eval run`."""
    found, _ = load_questions(QuestionSettings(path=str(questions)).open())
    requests = (GenerationRequest(n, each.chat, max_new_tokens) for n, each in enumerate(found))
    generator = BatchGenerator(GenerationPipeline.from_pretrained(model), 3)
    outputs = [output for batch in generator.generate(requests) for output in batch]
    return {
        found[output.request_id].id: (output.text, Answer.of(found[output.request_id], output.text).credit)
        for output in outputs
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"lora": {"rank": 2, "dropout": 0.5}},
        {"compile": True, "activation_checkpointing": "selective", "steps": 4},
        {"data": {"workers": 1}},
    ],
    ids=str,
)
def test_questions_do_not_change_the_run(runs, tmp_path, questions, changes):
    data = run_settings(runs, tmp_path)["data"] | changes.pop("data", {})
    changes = {"steps": 10, "data": data, **changes}
    run_recipe(run_settings(runs, tmp_path / "without", **changes))
    run_recipe(run_settings(runs, tmp_path / "with", **changes, **asking(questions)))
    ours, theirs = (read_steps(tmp_path / name) for name in ("with", "without"))
    for key in ("loss", "gradient_norm"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    weights = [load_model(tmp_path / name / "model").state_dict() for name in ("with", "without")]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        assert (tmp_path / "with/model" / name).read_text() == (tmp_path / "without/model" / name).read_text()


def test_answers_equal_those_of_the_exported_model(runs, tmp_path, questions):
    data = run_settings(runs, tmp_path)["data"] | {"sources": [{"path": "images.parquet"}]}
    run_recipe(run_settings(runs, tmp_path / "out", steps=42, data=data, **asking(questions, interval=20)))
    expected = generated(tmp_path / "out" / "model", questions)
    assert answers_of(tmp_path / "out", 42) == expected
    line = read_steps(tmp_path / "out")[-1]
    assert line["questions/accuracy"] == pytest.approx(sum(credit for _, credit in expected.values()) / 11)
    assert (
        0 <= line["questions/accuracy_low"] <= line["questions/accuracy"] <= line["questions/accuracy_high"]
    )
    assert line["questions/accuracy"] > 0.5  # it has learned the colors
    asked = [line["step"] for line in read_steps(tmp_path / "out") if "questions/accuracy" in line]
    assert asked == [20, 40, 42]


def test_images_of_questions_are_decoded_once(runs, tmp_path, questions, monkeypatch):
    encode, decoded = SoloImageProcessor.encode_image, []

    def encode_image(self, image, **options):
        decoded.append(image)
        return encode(self, image, **options)

    monkeypatch.setattr(SoloImageProcessor, "encode_image", encode_image)
    text = {**run_settings(runs, tmp_path)["data"], "sources": [{"path": "text.parquet"}]}
    train(
        Recipe.parse(
            run_settings(runs, tmp_path / "out", steps=2, data=text, **asking(questions, interval=1))
        )
    )
    assert len(decoded) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.jsonl", "no data files at .*nothing.jsonl"),
        ("questions.jsonl", r"questions\.jsonl.* tokens leave less than 256 for the answer"),
    ],
)
def test_unanswerable_questions_end_the_run_before_it_starts(runs, tmp_path, name, message):
    long = {"question": "hello " * 300, "answer": "yes"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(long) + "\n")
    plain = run_settings(runs, tmp_path / "out", **asking(tmp_path / name, max_new_tokens=490))
    with pytest.raises(SoloError, match=message) as error:
        train(Recipe.parse(plain))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_missing_image_ends_the_run_before_it_starts(runs, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"image": "no.png", "question": "what?", "answer": "red"}\n')
    with pytest.raises(SoloError, match=r"questions\.jsonl.*no\.png"):
        train(Recipe.parse(run_settings(runs, tmp_path / "out", **asking(tmp_path / "questions.jsonl"))))


def test_plain_llm_cannot_be_asked(runs, tmp_path, questions):
    llm, tokenizer = make_llm()
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    data = run_settings(runs, tmp_path)["data"] | {"sources": [{"path": "text.parquet"}]}
    plain = run_settings(runs, tmp_path / "out", model=str(tmp_path / "llm"), data=data, **asking(questions))
    with pytest.raises(SoloError, match="a plain LLM has no chats"):
        train(Recipe.parse(plain))


@pytest.mark.parametrize(
    ("family", "size", "changes"),
    [
        ("llama", 2, {}),
        ("llama", 2, {"parallel": {"tensor": 2}}),
        ("qwen3", 4, {"parallel": {"tensor": 2}}),
        ("qwen3", 2, {"parallel": {"context": 2}}),
        ("mistral", 3, {"global_batch": 6, "data": {"streams": 6}}),  # a sliding window; unequal shares
    ],
    ids=str,
)
@pytest.mark.distributed
def test_processes_answer_like_a_single_one(runs, tmp_path, start, questions, family, size, changes):
    data = run_settings(runs, tmp_path)["data"] | changes.pop("data", {})
    settings = {"model": family, "steps": 20, "data": data, **asking(questions), **changes}
    group = start(size, run_recipe, run_settings(runs, tmp_path / "shared", **settings))
    alone = run_settings(runs, tmp_path / "alone", **{**settings, "parallel": {}})
    assert start(1, run_recipe, alone).wait() == [0]
    assert group.wait() == [0] * size
    for step in (4, 8, 12, 16, 20):
        assert answers_of(tmp_path / "shared", step) == answers_of(tmp_path / "alone", step)
    ours, theirs = ([line["loss"] for line in read_steps(tmp_path / name)] for name in ("shared", "alone"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert answers_of(tmp_path / "shared", 20) == generated(tmp_path / "shared" / "model", questions)


@pytest.mark.parametrize("changes", [{}, {"parallel": {"reshard": False}}, {"precision": "bf16"}], ids=str)
@pytest.mark.distributed
def test_questions_do_not_change_a_sharded_run(runs, tmp_path, start, questions, changes):
    for name, more in (("without", {}), ("with", asking(questions, interval=2))):
        plain = run_settings(runs, tmp_path / name, steps=6, **changes, **more)
        assert start(2, run_recipe, plain).wait() == [0, 0]
    ours, theirs = ([line["loss"] for line in read_steps(tmp_path / name)] for name in ("with", "without"))
    assert ours == theirs
