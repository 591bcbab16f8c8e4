"""SIGKILL at random moments and during saves: complete checkpoints survive and losses do not change."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from tests.factories import read_steps, run_recipe, run_settings
from torch.distributed.checkpoint import filesystem

from solo_vlm.train import Recipe
from solo_vlm.train.checkpoint import load_checkpoint, load_train_state
from solo_vlm.train.model import load_base_model
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.storage import Folder

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """Return losses and durations of uninterrupted runs, by number of processes."""
    from tests.factories import ProcessGroup

    curves = {}
    for size in (1, 2):
        out = tmp_path_factory.mktemp("whole") / "out"
        started = time.monotonic()
        assert ProcessGroup(size, run_recipe, run_settings(runs, out)).wait() == [0] * size
        curves[size] = [line["loss"] for line in read_steps(out)], time.monotonic() - started
    return curves


def run_and_die_in_a_save(plain, where):
    """Die in the second save, before the rename or between two files."""
    saves = iter(range(2))

    def dying(function):
        def call(*arguments, **options):
            if next(saves, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    if where == "before the rename":
        Path.rename = dying(Path.rename)
    else:
        filesystem._write_item = dying(filesystem._write_item)
    run_recipe(plain)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("where", ["before the rename", "between two files"])
def test_resume_after_sigkill_during_save_matches_whole_run(runs, tmp_path, start, whole, where, size):
    plain = run_settings(runs, tmp_path / "out")
    group = start(size, run_and_die_in_a_save, plain, where)
    assert -signal.SIGKILL in group.wait(60)
    group.kill()
    left = list((tmp_path / "out" / "checkpoints").glob(".partial-*"))
    assert left
    assert start(size, run_recipe, plain).wait() == [0] * size
    assert [line["loss"] for line in read_steps(tmp_path / "out")] == whole[size][0]
    assert not list((tmp_path / "out" / "checkpoints").glob(".partial-*"))


@pytest.mark.parametrize("trial", range(20))
def test_resume_after_sigkill_matches_whole_run(runs, tmp_path, start, whole, trial):
    chance = random.Random(trial)
    before, after = chance.choice([1, 2]), chance.choice([1, 2, 4])
    if trial < 8:  # the same number of processes gives the same bits
        after = before
    plain = run_settings(runs, tmp_path / "out")
    group = start(before, run_recipe, plain)
    time.sleep(chance.uniform(0.1, 1.0) * whole[before][1])
    group.kill()
    finished = (tmp_path / "out" / "model").exists()
    for path in (tmp_path / "out" / "checkpoints").glob("step-*"):
        model, _ = load_base_model(runs / "llama")
        load_checkpoint(Folder(path), model, make_optimizer(model, Recipe.parse(plain).optimizer))
        assert load_train_state(Folder(path)).step == int(path.name.removeprefix("step-"))
    if not finished:
        assert start(after, run_recipe, plain).wait() == [0] * after
    curve = [line["loss"] for line in read_steps(tmp_path / "out")]
    if after == before or finished:
        assert curve == whole[before][0]
    else:
        assert curve == pytest.approx(whole[before][0], rel=1e-4)
