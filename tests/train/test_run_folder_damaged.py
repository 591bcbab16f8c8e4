"""Damage to the checkpoint or the data of a stopped run: a resume names the file, and never trains on it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from tests.factories import image_rows, run_settings, text_rows

from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.train import Recipe, train
from solo_vlm.utils.errors import SoloError

SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def stopped(runs, tmp_path_factory):
    """Train on one source of each format; return the folder of a run that was stopped after step 6."""
    folder = tmp_path_factory.mktemp("stopped")
    data = folder / "data"
    for name in ("parquet", "jsonl", "tar"):
        (data / name).mkdir(parents=True)
    for number in range(2):
        write_samples(data / "parquet" / f"{number}.parquet", image_rows(16))
        lines = [json.dumps(row) + "\n" for row in text_rows(64)]
        (data / "jsonl" / f"{number}.jsonl").write_text("".join(lines))
        with tarfile.open(data / "tar" / f"{number}.tar", "w") as tar:
            for row in range(16):
                picture = io.BytesIO()
                Image.new("RGB", (64, 64), (row, 0, 0)).save(picture, "PNG")
                for suffix, content in (("png", picture.getvalue()), ("txt", b"a square")):
                    member = tarfile.TarInfo(f"{row}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    settings = run_settings(runs, folder / "out", steps=7)
    settings["data"]["sources"] = [{"path": str(data / name)} for name in ("parquet", "jsonl", "tar")]
    settings["checkpoint"]["keep"] = 3
    train(Recipe.parse(settings))
    shutil.rmtree(folder / "out" / "model")
    shutil.rmtree(folder / "out" / "checkpoints" / "step-00000007")
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """Return a copy of the run and its data."""
    shutil.copytree(stopped, tmp_path / "run")
    recipe = tmp_path / "run" / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(stopped), str(tmp_path / "run")))
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "out" / "checkpoints" / "step-00000006"


def flip_bit(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def replace(path: Path, old: bytes, new: bytes) -> None:
    """Rewrite a file at the same size."""
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_name("swapped"))
    second.rename(first)
    first.with_name("swapped").rename(second)


def change_position(checkpoint: Path) -> None:
    file = checkpoint / "training_state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "step": state["step"] - 1}))


CHECKPOINT = {
    "flipped bit in the weights": (lambda c: flip_bit(c / SHARD, 0.1), SHARD),
    "flipped bit in the optimizer": (lambda c: flip_bit(c / SHARD, 0.9), SHARD),
    "flipped bit in the index of tensors": (lambda c: flip_bit(c / ".metadata"), ".metadata"),
    "flipped bit in the data's position": (lambda c: flip_bit(c / "training_state.json"), "training_state"),
    "edited step": (change_position, "training_state.json"),
    "truncated file": (lambda c: cut(c / SHARD, 1), SHARD),
    "missing file": (lambda c: (c / SHARD).unlink(), SHARD),
    "files of two checkpoints swapped": (
        lambda c: swap(c / SHARD, c.with_name("step-00000004") / SHARD),
        SHARD,
    ),
    "wrong size in the checksums": (lambda c: flip_bit(c / "checksums.json", 0.1), ""),
}
DATA = {
    "flipped bit in a parquet page": (lambda d: flip_bit(d / "parquet" / "1.parquet", 0.1), "parquet"),
    "truncated parquet file": (lambda d: cut(d / "parquet" / "1.parquet", 10), "parquet"),
    "truncated tar": (lambda d: cut(d / "tar" / "1.tar", 5000), "tar"),
    "damaged image in a tar": (lambda d: flip_bit(d / "tar" / "1.tar", 0.3), "tar"),
    "JSONL cut in a row": (lambda d: cut(d / "jsonl" / "1.jsonl", 20), "jsonl"),
    "file rewritten at the same size": (
        lambda d: replace(d / "jsonl" / "1.jsonl", b"hello", b"HELLO"),
        "jsonl",
    ),
    "files of a source swapped": (lambda d: swap(d / "tar" / "0.tar", d / "jsonl" / "0.jsonl"), "jsonl"),
    "shard deleted": (lambda d: (d / "jsonl" / "1.jsonl").unlink(), "jsonl"),
    "shard added": (lambda d: shutil.copy(d / "jsonl" / "1.jsonl", d / "jsonl" / "2.jsonl"), "jsonl"),
}


def refused(run: Path) -> str:
    recipe = Recipe.load(run / "out" / "recipe.yaml")
    with pytest.raises(SoloError) as caught:
        train(recipe)
    assert not (run / "out" / "model").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_undamaged_run_resumes(run):
    train(Recipe.load(run / "out" / "recipe.yaml"))
    assert (run / "out" / "model").is_dir()


@pytest.mark.parametrize("damage", CHECKPOINT)
def test_damaged_checkpoint_is_refused_by_name(run, damage):
    change, named = CHECKPOINT[damage]
    change(newest(run))
    message = refused(run)
    assert "step-00000006" in message
    assert named in message


@pytest.mark.parametrize("damage", DATA)
def test_damaged_data_is_refused_by_name(run, damage):
    change, named = DATA[damage]
    change(run / "data")
    assert f"{run}/data/{named}" in refused(run)
