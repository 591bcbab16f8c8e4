"""Damaged checkpoints: the error names the file and offers an older checkpoint."""

from __future__ import annotations

import json
import shutil
import zlib

import pytest
from tests.factories import ProcessGroup, read_steps, run_recipe, run_settings

from solo_vlm.train import Recipe, train
from solo_vlm.train.checkpoint import (
    export_checkpoint,
    find_damage,
    load_checkpoint,
    load_train_state,
    warn_if_disk_is_short,
)
from solo_vlm.train.model import load_base_model
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.recipe import OptimizerSettings
from solo_vlm.train.storage import Folder
from solo_vlm.utils.errors import SoloError

SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    """Train for seven steps, with checkpoints of steps 4 and 6."""
    out = tmp_path_factory.mktemp("damaged") / "out"
    train(Recipe.parse(run_settings(runs, out, steps=7, checkpoint={"save_interval": 2, "keep": 3})))
    shutil.rmtree(out / "checkpoints" / "step-00000007")
    return out


@pytest.fixture
def run(finished, tmp_path):
    """Return the same run as if it had been killed after step 6."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "model")
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(finished), str(out)))
    return out


@pytest.fixture
def newest(run):
    return run / "checkpoints" / "step-00000006"


def resume(run):
    train(Recipe.load(run / "recipe.yaml"))


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_state(folder, **changes):
    """Change the state, and its checksum with it."""
    state, checksums = folder / "training_state.json", folder / "checksums.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **changes}))
    listed = json.loads(checksums.read_text())
    content = state.read_bytes()
    listed[state.name] = [len(content), f"{zlib.crc32(content):08x}"]
    checksums.write_text(json.dumps(listed))


def replace_by_older(folder, name):
    shutil.copy(folder.with_name("step-00000004") / name, folder / name)


def rename_older(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000004"), folder)


def resize(file, size):
    content = file.read_bytes()
    file.write_bytes((content + bytes(8))[:size])


DAMAGES = {
    "flipped bit in the weights": (lambda f: flip_bit(f / SHARD), SHARD),
    "flipped bit in torch's metadata": (lambda f: flip_bit(f / ".metadata"), ".metadata"),
    "flipped bit in the state": (lambda f: flip_bit(f / "training_state.json"), "training_state.json"),
    "flipped bit in the checksums": (lambda f: flip_bit(f / "checksums.json"), ""),
    "truncated weights": (lambda f: resize(f / SHARD, -100), SHARD),
    "empty weights": (lambda f: resize(f / SHARD, 0), SHARD),
    "longer weights": (lambda f: resize(f / SHARD, None), SHARD),
    "no weights": (lambda f: (f / SHARD).unlink(), SHARD),
    "no metadata": (lambda f: (f / ".metadata").unlink(), ".metadata"),
    "no state": (lambda f: (f / "training_state.json").unlink(), "training_state.json"),
    "no checksums": (lambda f: (f / "checksums.json").unlink(), "checksums.json"),
    "shard of another run": (lambda f: shutil.copy(f / SHARD, f / "__1_0.distcp"), "__1_0.distcp"),
    "weights of another step": (lambda f: replace_by_older(f, SHARD), SHARD),
    "state of another step": (lambda f: replace_by_older(f, "training_state.json"), "training_state.json"),
    "folder of another step": (rename_older, "training_state.json is of step 4"),
    "state without data": (lambda f: change_state(f, data=None), "training_state.json has no position"),
    "state of a newer version": (lambda f: change_state(f, epoch=1), "training_state.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_reported_with_the_name_of_the_file(runs, newest, kind):
    damage, named = DAMAGES[kind]
    damage(newest)
    model, _ = load_base_model(runs / "llama")
    with pytest.raises(SoloError, match=f"step-00000006: .*{named}") as caught:
        load_checkpoint(Folder(newest), model)
        load_train_state(Folder(newest))
    assert "\n" not in str(caught.value)


def test_undamaged_checkpoint_with_copies_next_to_it_is_accepted(run, newest):
    shutil.copytree(newest, newest.with_name("step-100.bak"))
    assert find_damage(Folder(newest)) is None
    resume(run)
    assert [line["step"] for line in read_steps(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert newest.with_name("step-100.bak").is_dir()


def test_resume_offers_the_newest_intact_checkpoint_and_uses_it_once_the_damaged_one_is_removed(
    finished, run, newest
):
    flip_bit(newest / SHARD)
    offer = f"{SHARD} is damaged.*step-00000004 is intact: move step-00000006 to another folder"
    with pytest.raises(SoloError, match=offer):
        resume(run)
    newest.rename(run / "damaged")
    resume(run)
    assert [line["loss"] for line in read_steps(run)] == [line["loss"] for line in read_steps(finished)]
    assert (run / "manifest.json").is_file()


def test_error_suggests_a_new_run_without_an_intact_checkpoint(run, newest):
    for folder in newest.parent.iterdir():
        (folder / SHARD).unlink()
    with pytest.raises(SoloError, match="no older one that is intact: start a new run"):
        resume(run)


def test_export_rejects_damage_and_another_start_model(runs, run, newest, tmp_path):
    flip_bit(newest / SHARD)
    with pytest.raises(SoloError, match=f"{SHARD} is damaged.*step-00000004 is intact"):
        export_checkpoint(run, tmp_path / "exported")
    assert export_checkpoint(run, tmp_path / "exported", step=4) == 4
    inputs = json.loads((run / "inputs.json").read_text())
    inputs["llama/config.json"] = "changed"
    (run / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(SoloError, match=r"llama/config\.json changed since the run"):
        export_checkpoint(run, tmp_path / "again", step=4)
    assert not (tmp_path / "again").exists()


def test_short_disk_is_warned_about_at_the_start(runs, small_disk, caplog):
    model, _ = load_base_model(runs / "llama")
    optimizer = make_optimizer(model, OptimizerSettings())
    warn_if_disk_is_short(small_disk.folder, model, optimizer, 2)
    assert "has 0.00 GB free, but the run needs about" in caplog.text
    caplog.clear()
    small_disk.resize("64m")
    warn_if_disk_is_short(small_disk.folder, model, optimizer, 2)
    assert not caplog.text


@pytest.mark.distributed
def test_damaged_shard_of_one_process_ends_all_processes(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=7)
    assert ProcessGroup(2, run_recipe, plain).wait() == [0, 0]
    shutil.rmtree(tmp_path / "out" / "model")
    newest = tmp_path / "out" / "checkpoints" / "step-00000007"
    names = json.loads((newest / "checksums.json").read_text())
    assert {SHARD, "__1_0.distcp", ".metadata", "training_state.json"} == names.keys()
    flip_bit(newest / "__1_0.distcp")
    assert 0 not in ProcessGroup(2, run_recipe, plain).wait(60)
    assert not (tmp_path / "out" / "model").exists()
