"""Full and read-only disks: every command fails with one line, and succeeds once there is space."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tests.data.catalog.catalog_rows import USUAL
from tests.evaluate.evaluation_runs import write_data_root
from tests.factories import (
    image_rows,
    make_llm,
    make_solo,
    read_steps,
    run_recipe,
    run_settings,
    text_rows,
    write_training_data,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder of inputs: an LLM, a SOLO model, data, a run, images, a table."""
    folder = tmp_path_factory.mktemp("inputs")
    for part in make_llm():
        part.save_pretrained(folder / "llm")
    make_solo().save(folder / "llama")
    write_training_data(folder, image_rows(24), text_rows(64))
    settings = run_settings(folder, "out", steps=5)
    run_recipe(settings)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    (folder / "raw").mkdir()
    question = USUAL["vqav2"][0]
    answers = (hashlib.sha512(bytes([n % 256, n // 256])).hexdigest() for n in range(600))
    rows = [{**question, "texts": [{**question["texts"][0], "assistant": answer}]} for answer in answers]
    pq.write_table(pa.Table.from_pylist(rows), folder / "raw" / "x.parquet")
    (folder / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (64, 32), (number, 0, 0)).save(folder / "images" / f"{number}.png")
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "broken.jsonl").write_text('{"messages": []}\n' * 600)
    (folder / "broken.yaml").write_text(yaml.safe_dump(broken_mixture(folder)))
    sizes = [(n, d) for n in (1e8, 3e8, 1e9, 3e9) for d in (1e10, 3e10, 1e11)]
    points = [f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28}" for n, d in sizes]
    (folder / "points.csv").write_text("\n".join(["n,d,loss", *points, ""]))
    write_data_root(folder / "benchmarks", ["ai2d"])
    return folder


def broken_mixture(folder: Path) -> dict[str, Any]:
    data = {"sources": [{"path": "broken.jsonl"}], "max_skipped": 1}
    return {"root": str(folder), "model": "llama", "data": data}


COMMANDS = {
    "init": "init --llm {inputs}/llm --out {disk}/model",
    "convert checkpoint": "convert checkpoint {inputs}/out {disk}/model",
    "data convert": "data convert vqav2 --raw {inputs}/raw --out {disk}/data --workers 1",
    "data convert, two workers": "data convert vqav2 --raw {inputs}/raw --out {disk}/data --workers 2",
    "inspect": "inspect --image {inputs}/noise.png --out {disk}/grid.png",
    "data view": "data view {inputs}/recipe.yaml --out {disk}/view.html --samples 60",
    "push": "push {inputs}/llama owner/name --dry-run --out {disk}/published --license mit --base-model a/b",
    "data verify": "data verify {inputs}/broken.yaml --report {disk}/report.jsonl",
    "eval run": "eval run --model {inputs}/llama --tasks ai2d --data-root {inputs}/benchmarks "
    "--out {disk}/scores --max-new-tokens 2",
    "eval contamination": "eval contamination --mixture {inputs}/recipe.yaml --tasks ai2d "
    "--data-root {inputs}/benchmarks --out {disk}/contamination",
    "scaling fit": "scaling fit {inputs}/points.csv --out {disk}/law",
    "scaling plot": "scaling plot {inputs}/points.csv --out {disk}/plots",
    "train": "train {inputs}/recipe.yaml out={disk}/run",
    "train, synchronous": "train {inputs}/recipe.yaml out={disk}/run checkpoint.asynchronous=false",
    "train, TensorBoard": "train {inputs}/recipe.yaml out={disk}/run trackers=[tensorboard]",
}

SMALL_OUTPUTS = ("data verify", "eval contamination")  # of a few kilobytes


def finished_files(folder: Path) -> list[str]:
    """Return the final names of a command's files, without locks and logs."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk_is_a_one_line_error_and_the_command_succeeds_with_more_space(
    run, inputs, small_disk, name
):
    arguments = COMMANDS[name].format(inputs=inputs, disk=small_disk.folder).split()
    if name in SMALL_OUTPUTS:
        (small_disk.folder / "other").write_bytes(bytes(12 * 1024))
    code, _, error = run(*arguments)
    *progress, last = error.strip().splitlines()
    assert code == 2, error
    assert last.startswith(f"solo: cannot write {small_disk.folder}/")
    assert last.endswith("No space left on device; free space there, then run the same command again")
    assert not any("Traceback" in line or "Error" in line for line in progress)
    assert not list(small_disk.folder.rglob(".partial-*"))
    assert not [file for file in finished_files(small_disk.folder) if file.endswith(".safetensors")]
    small_disk.resize("64m")
    code, _, error = run(*arguments)
    assert code == 0, error


@pytest.mark.parametrize("name", COMMANDS)
def test_read_only_disk_is_a_one_line_error(run, inputs, small_disk, name):
    arguments = COMMANDS[name].format(inputs=inputs, disk=small_disk.folder).split()
    small_disk.allow_writing(False)
    code, _, error = run(*arguments)
    assert code == 2
    (line,) = error.strip().splitlines()
    assert line.startswith(f"solo: cannot write {small_disk.folder}/")
    assert "Read-only file system; make it writable, or choose another place" in line


def test_full_disk_during_a_checkpoint_keeps_earlier_checkpoints(run, inputs, small_disk):
    """The first checkpoint fits, the second does not."""
    small_disk.resize("64m")
    command = ["train", inputs / "recipe.yaml", f"out={small_disk.folder}/run", "steps=3"]
    assert run(*command)[0] == 0
    first = small_disk.folder / "run" / "checkpoints" / "step-00000002"
    used = sum(path.stat().st_size for path in first.iterdir())
    shutil.rmtree(small_disk.folder / "run")
    small_disk.resize(f"{int(1.5 * used)}")
    command[-1] = "steps=8"
    code, _, error = run(*command)
    assert code == 2
    assert f"solo: cannot write {small_disk.folder}/run/checkpoints: No space left on device" in error
    left = [path.name for path in (small_disk.folder / "run" / "checkpoints").iterdir()]
    assert left == ["step-00000002"]
    small_disk.resize("64m")
    assert run(*command, "--resume")[0] == 0
    assert run("train", inputs / "recipe.yaml", f"out={inputs}/whole", "steps=8")[0] == 0
    resumed, whole = read_steps(small_disk.folder / "run"), read_steps(inputs / "whole")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]


def test_small_shared_memory_is_a_one_line_error_and_the_run_resumes_with_more(inputs, small_disk, tmp_path):
    """As in a container, whose /dev/shm has 64 MB by default."""
    command = [sys.executable, "-m", "solo_vlm", "train", inputs / "recipe.yaml", f"out={tmp_path}/run"]
    in_container = f'mount --bind {small_disk.folder} /dev/shm && exec "$@"'
    small_disk.resize("96k")
    for code in (2, 0):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", in_container, "sh", *command, "data.workers=2"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        if code:
            assert "Traceback" not in done.stderr
            assert done.stderr.splitlines()[-1].startswith("solo: shared memory (/dev/shm) is too small")
        small_disk.resize("64m")
    assert [line["step"] for line in read_steps(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_too_few_open_files_are_a_one_line_error(inputs, tmp_path):
    """Each tensor of a batch that a worker has prepared is one."""
    command = [sys.executable, "-m", "solo_vlm", "train", inputs / "recipe.yaml", f"out={tmp_path}/run"]
    limited = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", *command, "data.workers=8"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("solo: too many open files: raise the limit (ulimit -n)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_standard_output_is_a_one_line_error():
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "solo_vlm", "data", "list", "--json"], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("solo: cannot write the output: No space left on device; free space there")


def test_closed_output_pipe_is_not_an_error():
    command = [sys.executable, "-m", "solo_vlm", "data", "list", "--markdown"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_answers_that_fit_are_kept_and_the_run_resumes(run, inputs, small_disk):
    out = small_disk.folder / "answers.jsonl"
    prompt = "what is this? " * 100
    command = ["generate", "--model", inputs / "llama", "--images", inputs / "images", "--out", out]
    command += ["--prompt", prompt, "--max-new-tokens", 2, "--batch-size", 2]
    code, _, error = run(*command)
    assert code == 2
    assert error.startswith(f"solo: cannot write {out}: No space left on device")
    kept = out.read_bytes().splitlines(keepends=True)
    assert 0 < len(kept) < 12
    assert all(line.endswith(b"}\n") for line in kept)
    small_disk.resize("1m")
    assert run(*command)[0] == 0
    assert out.read_bytes().splitlines(keepends=True)[: len(kept)] == kept


LONG_COMMANDS = [
    "quickstart --out {disk}/quick",
    "scaling sweep sweeps/toy root={disk}",
    "ablate from-scratch root={disk}",
]


@pytest.mark.parametrize("command", LONG_COMMANDS)
def test_full_disk_stops_a_study_with_one_line(run, small_disk, command):
    code, _, error = run(*command.format(disk=small_disk.folder).split())
    assert code == 2, error
    assert error.strip().splitlines()[-1].startswith(f"solo: cannot write {small_disk.folder}/"), error


@pytest.mark.parametrize(
    "command",
    [
        *LONG_COMMANDS,
        "generate --model {inputs}/llama --images {inputs}/images --out {disk}/answers.jsonl --prompt x",
    ],
)
def test_read_only_disk_stops_other_commands_with_one_line(run, inputs, small_disk, command):
    small_disk.allow_writing(False)
    code, _, error = run(*command.format(disk=small_disk.folder, inputs=inputs).split())
    assert code == 2, error
    *progress, line = error.strip().splitlines()
    assert not any("Traceback" in text for text in progress)
    assert line.startswith(f"solo: cannot write {small_disk.folder}")
    assert "Read-only file system; make it writable, or choose another place" in line


@pytest.mark.parametrize(
    ("place", "reason"),
    [("file/x", "File exists"), ("folder", "Is a directory"), ("x" * 300, "File name too long")],
)
def test_impossible_place_is_a_one_line_error(run, inputs, tmp_path, place, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    code, _, error = run("inspect", "--image", inputs / "noise.png", "--out", tmp_path / place)
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith(f"solo: cannot access {tmp_path}/")
    assert f": {reason}; choose" in line
