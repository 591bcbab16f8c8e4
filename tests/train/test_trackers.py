"""The hosted trackers for real, offline."""

from __future__ import annotations

import sqlite3

import pytest
from tests.factories import run_settings

from solo_vlm.train import Recipe, train


def test_weights_and_biases_gets_every_step_and_goes_on_with_its_run(runs, tmp_path, monkeypatch):
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


def test_trackio_gets_every_step(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    train(Recipe.parse(run_settings(runs, tmp_path / "out", steps=3, trackers=["trackio"])))
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, step from metrics order by step").fetchall()
    assert rows == [("out", 1), ("out", 2), ("out", 3)]
