"""Evaluation on held-out data: the best checkpoint, early stop, and resume."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import yaml
from PIL import Image
from tests.factories import read_steps, run_settings

from solo_vlm.train import Recipe, train, validation
from solo_vlm.train.checkpoint import Best, TrainState, export_checkpoint, load_train_state
from solo_vlm.train.recipe import ValidationSettings
from solo_vlm.train.storage import CheckpointStore, Folder, step_of
from solo_vlm.train.validation import LossValidator, note_best
from solo_vlm.utils.errors import SoloError


def settings(**changes):
    plain = {"sources": [{"path": "images.parquet"}], "questions": "q.jsonl", "best": "questions/accuracy"}
    return ValidationSettings.model_validate(plain | changes)


def evaluated(values, **changes):
    """Return the state after evaluations with these values at steps 10, 20, ..."""
    chosen, state = settings(**changes), TrainState()
    for value in values:
        if state.stopped:
            break
        state.step += 10
        note_best(state, chosen, {chosen.best: value})
    return state


def test_best_is_the_highest_accuracy_or_the_lowest_loss():
    assert evaluated([0.2, 0.5, 0.5, 0.4]).best == Best("questions/accuracy", 0.5, 20)
    assert evaluated([2.0, 1.5, math.nan, 1.7], best="validation_loss").best == Best(
        "validation_loss", 1.5, 20
    )
    assert evaluated([math.nan], best="validation_loss").best is None


def test_patience_counts_evaluations_without_improvement():
    assert not evaluated([0.2, 0.1, 0.3, 0.3], patience=2).stopped
    state = evaluated([0.2, 0.3, 0.1, 0.3, 0.9], patience=2)
    assert state.step == 40
    assert state.stopped == "questions/accuracy was not better than 0.3 at step 20 in 2 evaluations"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"best": "accuracy"},
            "best = accuracy is not measured: set it to validation_loss or questions/accuracy",
        ),
        ({"best": None, "patience": 3}, "patience needs the metric that has to improve"),
        ({"sources": [], "best": "validation_loss"}, "set it to questions/accuracy"),
        ({"questions": {"docs": "q.jsonl"}}, "set it to validation_loss or docs/accuracy"),
    ],
)
def test_best_must_be_measured(runs, tmp_path, changes, message):
    plain = {"sources": [{"path": "images.parquet"}], "questions": "q.jsonl", "best": "questions/accuracy"}
    with pytest.raises(SoloError, match=message):
        Recipe.parse(run_settings(runs, tmp_path / "out", validation=plain | changes))


def test_validation_without_data_is_rejected(runs, tmp_path):
    with pytest.raises(SoloError, match="set sources, questions or both"):
        Recipe.parse(run_settings(runs, tmp_path / "out", validation={"interval": 3}))


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that sets the validation losses of the following evaluations."""

    def script(*values):
        losses = iter(values)
        monkeypatch.setattr(LossValidator, "loss", lambda self, model: next(losses))

    return script


def validating(runs, out, **changes):
    plain = {"sources": [{"path": "images.parquet"}], "interval": 2, "best": "validation_loss", **changes}
    return Recipe.parse(
        run_settings(runs, out, steps=12, validation=plain, checkpoint={"save_interval": 3, "keep": 1})
    )


def steps_of(out):
    return [step_of(path) for path in CheckpointStore(out / "checkpoints").checkpoints()]


def test_best_checkpoint_survives_rotation(runs, tmp_path, scripted):
    scripted(3.0, 1.0, 2.0, 2.5, 2.0, 1.5)
    result = train(validating(runs, tmp_path / "out"))
    assert steps_of(tmp_path / "out") == [4, 12]  # the best, and the last
    assert result.metrics["best"] == {"metric": "validation_loss", "value": 1.0, "step": 4}
    assert load_train_state(Folder(tmp_path / "out/checkpoints/step-00000004")).best.step == 4


def weights(model):
    return (model / "model.safetensors").read_bytes()


def test_best_checkpoint_is_exported(runs, tmp_path, scripted, run):
    scripted(3.0, 1.0, 2.0, 2.5)
    out, exported = tmp_path / "out", tmp_path / "exported"
    settings = validating(runs, out, patience=2).model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    code, printed, error = run("train", str(tmp_path / "run.yaml"))
    assert code == 0, error
    *_, early, best = printed.splitlines()
    assert early.startswith("stopped early: validation_loss was not better than 1 at step 4")
    assert best == (
        f"best: step 4, validation_loss 1; {out / 'model'} is of the last step (8), export the best with "
        f"solo convert checkpoint {out} FOLDER --best"
    )
    assert run("convert", "checkpoint", str(out), str(exported), "--best") == (
        0,
        f"{exported}: the model after step 4\n",
        "",
    )
    export_checkpoint(out, tmp_path / "four", step=4)
    assert weights(exported) == weights(tmp_path / "four")
    assert weights(exported) != weights(out / "model")


def test_export_of_the_best_needs_one(runs, tmp_path, run):
    train(Recipe.parse(run_settings(runs, tmp_path / "out", steps=2)))
    for options, message in (
        (["--best"], "has no best checkpoint: its recipe does not set validation.best"),
        (["--best", "--step", "1"], "give either --step or --best"),
    ):
        code, _, error = run("convert", "checkpoint", str(tmp_path / "out"), str(tmp_path / "new"), *options)
        assert (code, message in " ".join(error.split())) == (2, True)


def test_older_best_is_removed_once_the_new_one_is_saved(runs, tmp_path, scripted):
    scripted(3.0, 2.0, 2.5, 2.5, 1.0, 1.5)
    train(validating(runs, tmp_path / "out"))
    assert steps_of(tmp_path / "out") == [10, 12]


def test_last_step_may_be_the_best(runs, tmp_path, scripted, run):
    scripted(3.0, 2.0, 2.5, 2.5, 2.2, 1.5)
    settings = validating(runs, tmp_path / "out").model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    code, printed, error = run("train", str(tmp_path / "run.yaml"))
    assert code == 0, error
    best = f"best: step 12, validation_loss 1.5; {tmp_path / 'out/model'} is this model"
    assert printed.splitlines()[-1] == best
    assert steps_of(tmp_path / "out") == [12]


def test_resumed_run_knows_its_best(runs, tmp_path, monkeypatch):
    whole, cut = (validating(runs, tmp_path / name, sequences=2) for name in ("whole", "cut"))
    expected = train(whole).metrics["best"]
    evaluate = validation.Validation.evaluate

    def dies(self, model, state):
        if state.step == 10:
            raise KeyboardInterrupt
        return evaluate(self, model, state)

    with monkeypatch.context() as patch:
        patch.setattr(validation.Validation, "evaluate", dies)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert train(cut, resume=True).metrics["best"] == expected
    keys = ("step", "loss", "validation_loss")
    ours, theirs = (
        [[line.get(key) for key in keys] for line in read_steps(tmp_path / name)] for name in ("cut", "whole")
    )
    assert ours == theirs
    assert steps_of(tmp_path / "cut") == steps_of(tmp_path / "whole")


def test_early_stop_ends_with_a_model_and_says_why(runs, tmp_path, scripted, caplog):
    scripted(3.0, 2.0, 2.5, 2.5)
    result = train(validating(runs, tmp_path / "out", patience=2))
    assert result.metrics["steps"] == 8
    reason = "validation_loss was not better than 2 at step 4 in 2 evaluations"
    assert result.metrics["stopped"] == reason
    assert (result.model / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["outcome"]["stopped"] == reason
    assert 4 in steps_of(tmp_path / "out")
    assert train(validating(runs, tmp_path / "out", patience=2)) == result
    assert f"holds the finished run of this recipe, which ended early ({reason})" in caplog.text


def test_run_killed_after_an_early_stop_ends_in_the_same_way(runs, tmp_path, scripted):
    scripted(3.0, 2.0, 2.5, 2.5)
    first = train(validating(runs, tmp_path / "out", patience=2))
    shutil.rmtree(first.model)
    scripted(2.5, 2.5)  # of steps 6 and 8 again
    again = train(validating(runs, tmp_path / "out", patience=2), resume=True)
    assert again.metrics["stopped"] == first.metrics["stopped"]
    assert [line["step"] for line in read_steps(tmp_path / "out")] == list(range(1, 9))


def test_end_of_the_data_is_evaluated(runs, tmp_path):
    data = run_settings(runs, tmp_path)["data"] | {"epochs": 1}
    plain = {
        "sources": [{"path": "images.parquet"}],
        "interval": 1000,
        "sequences": 2,
        "best": "validation_loss",
    }
    train(Recipe.parse(run_settings(runs, tmp_path / "out", steps=None, data=data, validation=plain)))
    lines = read_steps(tmp_path / "out")
    assert [line["step"] for line in lines if "validation_loss" in line] == [lines[-1]["step"]]
    assert lines[-1]["step"] in steps_of(tmp_path / "out")


def test_changed_questions_are_found_on_resume(runs, tmp_path, monkeypatch):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what is this?", "answer": "red"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    plain = {"questions": str(tmp_path / "q.jsonl"), "interval": 3, "max_new_tokens": 4}
    recipe = Recipe.parse(run_settings(runs, tmp_path / "out", steps=6, validation=plain))
    with monkeypatch.context() as patch:
        patch.setattr("solo_vlm.train.trainer.export_model", None)
        with pytest.raises(TypeError):
            train(recipe)
    (tmp_path / "q.jsonl").write_text(json.dumps(row | {"answer": "blue"}) + "\n")
    with pytest.raises(SoloError, match="questions questions changed since the run"):
        train(recipe)


def test_answers_are_logged_once_per_evaluation_after_resume(runs, tmp_path, monkeypatch):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what is this?", "answer": "red"}
    (tmp_path / "q.jsonl").write_text((json.dumps(row) + "\n") * 3)
    plain = {"questions": str(tmp_path / "q.jsonl"), "interval": 3, "samples": 2, "max_new_tokens": 4}
    recipe = Recipe.parse(run_settings(runs, tmp_path / "out", steps=6, validation=plain))
    with monkeypatch.context() as patch:
        patch.setattr("solo_vlm.train.trainer.export_model", None)
        with pytest.raises(TypeError):
            train(recipe)
    train(recipe)
    records = list(map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines()))
    assert [(record["step"], record["id"]) for record in records] == [
        (s, n) for s in (3, 6) for n in ("1", "3")
    ]
    assert records[0].keys() == {"step", "file", "id", "question", "expected", "answer", "credit"}
    page = (tmp_path / "out" / "answers.html").read_text()
    assert "step 3" in page
    assert page.count("data:image/jpeg") == 2
