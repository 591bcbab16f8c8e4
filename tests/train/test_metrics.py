"""Metrics of a step, `metrics.jsonl`, progress lines, and trackers (the hosted ones offline)."""

from __future__ import annotations

import io
import sqlite3
import sys
import time
from itertools import islice

import pytest
import torch
from rich.console import Console
from tests.factories import read_steps, run_settings

from solo_vlm.data.encode import Encoder
from solo_vlm.data.mixture import make_loader
from solo_vlm.train import Recipe, train, trainer
from solo_vlm.train.metrics import MetricsLogger, ProgressLines, first_start, progress_bar
from solo_vlm.train.model import load_base_model
from solo_vlm.train.storage import Folder
from solo_vlm.utils.errors import SoloError


def losses(out):
    return [line["loss"] for line in read_steps(out)]


def test_step_metrics_match_token_counts(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=2)
    train(Recipe.parse(plain))
    recipe = Recipe.parse(plain)
    _, processor = load_base_model(runs / "llama")
    batches = list(islice(make_loader(recipe.mixture, processor, recipe.mixture.open_sources()), 4))
    line = read_steps(tmp_path / "out")[0]
    ids = torch.cat([batch["input_ids"][0] for batch in batches])
    bos, vision = processor.tokenizer.bos_token_id, torch.tensor(Encoder(processor).vision_ids)
    assert line["documents"] == int((ids == bos).sum())
    assert line["vision_tokens"] == int(torch.isin(ids, vision).sum())
    assert line["supervised_tokens"] == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    # Documents end with a supervised token, padding does not.
    padding = sum(int(b["cu_seq_lens_q"].diff()[-1]) for b in batches if b["labels"][0, -1] == -100)
    assert line["text_tokens"] + line["vision_tokens"] == 4 * 64 - padding
    assert line["fill"] == pytest.approx((4 * 64 - padding) / (4 * 64))


def test_forced_colors_do_not_make_a_live_view(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in cells of a notebook
    with progress_bar() as progress:
        assert isinstance(progress, ProgressLines)


def test_goodput_counts_time_between_runs(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=2)
    train(Recipe.parse(plain))
    line = read_steps(tmp_path / "out")[-1]
    assert 0 < line["goodput"] < 1
    assert line["slowest_rank"] == 0
    assert line["slowest_ratio"] == 1
    assert first_start([Folder(tmp_path / "out")]) <= time.time()
    (tmp_path / "out" / "first_start").write_text("1000000000\n")
    assert first_start([Folder(tmp_path / "out")]) == 1_000_000_000


def test_truncated_metrics_line_is_repaired_on_resume(runs, tmp_path, monkeypatch):
    plain = run_settings(runs, tmp_path / "out", steps=6)
    whole = run_settings(runs, tmp_path / "whole", steps=6)
    train(Recipe.parse(whole))
    optimizer_step = trainer.optimizer_step

    def dies(model, optimizer, *arguments):
        if optimizer.state[next(model.parameters())]["step"] == 5:
            raise KeyboardInterrupt
        return optimizer_step(model, optimizer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(Recipe.parse(plain))
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(Recipe.parse(plain))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "\0" * 100, '[3]\n{"step": 4, "loss": 1.0}\n'])
def test_lost_metrics_are_reported_and_cut(tmp_path, caplog, tail):
    file = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
    file.write_text(whole + tail)
    with progress_bar(quiet=True) as progress:
        MetricsLogger(tmp_path, [], progress, total_steps=9, done=4).close()
    assert file.read_text() == whole
    (record,) = caplog.records
    assert record.message == f"{file} is damaged from line 3 on: metrics of steps 3 to 4 may be lost"


def test_missing_tracker_package_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SoloError, match="pip install wandb"):
        train(Recipe.parse(run_settings(runs, tmp_path / "out", trackers=["wandb"])))


def test_wandb_logs_every_step_under_stored_run_id(runs, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    log = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run,
        "log",
        lambda run, data, step: (logged.append((run.id, step, data)), log(run, data, step)),
    )
    train(Recipe.parse(run_settings(runs, tmp_path / "out", steps=3, trackers=["wandb"])))
    identity = (tmp_path / "out" / "wandb_id").read_text()
    assert [(run, step) for run, step, _ in logged] == [(identity, step) for step in (1, 2, 3)]
    assert list(tmp_path.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))


def test_trackio_logs_every_step(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    train(Recipe.parse(run_settings(runs, tmp_path / "out", steps=3, trackers=["trackio"])))
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, step from metrics order by step").fetchall()
    assert rows == [("out", 1), ("out", 2), ("out", 3)]


def test_progress_lines_report_start_interval_and_end():
    output = io.StringIO()
    with ProgressLines(Console(file=output), interval=0.05) as progress:
        task = progress.add_task("stage1", total=1200, unit="step", metrics={})
        progress.update(task, completed=300, metrics={"loss": 2.5})
        deadline = time.monotonic() + 30
        while output.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        progress.update(task, completed=1200)
        progress.update(task, completed=1200)
    first, *between, last = output.getvalue().splitlines()
    assert first == "stage1: step 0 of 1,200"
    assert len(between) >= 2
    assert all(line.startswith("stage1: step 300 of 1,200, loss 2.5000") for line in between)
    assert last.startswith("stage1: step 1,200 of 1,200, loss 2.5000, done in 0:00:")
