"""The command line: exit codes, one-line errors, JSON output, and no leftover files."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image
from tests.factories import make_llm, make_solo
from tests.serve.hostile_images import exif_that_overlaps, png_chunk, png_file

from solo_vlm import SoloConfig, SoloImageProcessor
from solo_vlm.cli._common import print_table


def bomb(path: Path) -> Path:
    """Write a PNG that claims 30,000 x 30,000 pixels."""
    path.write_bytes(png_file(30_000, 30_000, pixels=png_chunk(b"IDAT", zlib.compress(bytes(1000)))))
    return path


@pytest.fixture
def bad_image(tmp_path, picture):
    """Make an unusable image file."""

    def make(kind: str) -> Path:
        path = tmp_path / {"text": "text.png", "truncated": "cut.jpg"}.get(kind, f"{kind}.png")
        if kind == "truncated":
            picture(300, 200).save(path, "JPEG")
            path.write_bytes(path.read_bytes()[:2000])
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "text":
            path.write_text("this is not a picture")
        elif kind == "bomb":
            bomb(path)
        return path

    return make


BAD_IMAGES = ["truncated", "empty", "missing", "text", "bomb"]


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_is_a_one_line_error_with_exit_code_2(run, solo_folder, bad_image, tmp_path, kind):
    path = bad_image(kind)
    for arguments in (
        ["generate", "--model", solo_folder, "--image", path, "--prompt", "what?"],
        ["inspect", "--image", path, "--out", tmp_path / "grid.out.png"],
    ):
        code, out, error = run(*arguments)
        assert code == 2
        assert out == ""
        assert len(error.strip().splitlines()) == 1
        assert path.name in error
        assert "Traceback" not in error
    assert not (tmp_path / "grid.out.png").exists()
    assert not list(tmp_path.glob(".partial*"))


def test_very_thin_image_is_rejected_before_decoding(run, solo_folder, tmp_path):
    Image.new("RGB", (1, 5000), "red").save(tmp_path / "thin.png")
    inspect = ("inspect", "--image", tmp_path / "thin.png", "--out", tmp_path / "grid.png")
    generate = ("generate", "--model", solo_folder, "--image", tmp_path / "thin.png", "--prompt", "hi")
    for command in (inspect, generate):
        code, _, err = run(*command)
        assert code == 2
        assert "aspect ratio 5000 (5000 x 1 pixels) exceeds max_aspect_ratio=200" in err
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    "content", [None, {}, {"config.json": "{"}, {"config.json": '{"model_type": "bert"}'}]
)
def test_unreadable_model_folder_is_a_one_line_error(run, tmp_path, content):
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    code, out, error = run("generate", "--model", folder, "--prompt", "hi")
    assert (code, out) == (2, "")
    assert len(error.strip().splitlines()) == 1
    assert str(folder) in error


MODEL_COMMANDS = [
    "chat --model {}",
    "check {}",
    "generate --model {} --prompt y",
    "init --llm {} --out out",
    "inspect --model {} --image x.png --out y.png",
    "serve --model {}",
]


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize("path", ["./typo", "runs/sft/typo", "/tmp/typo"])
def test_missing_model_folder_is_not_looked_for_on_the_hub(run, command, path):
    code, _, error = run(*command.format(path).split())
    assert (code, error) == (2, f"solo: no model at {path}\n")


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_unreachable_hub_is_named_beside_the_missing_folder(run, command):
    """A name with at most one slash may be a folder or a model of the hub; tests are offline."""
    code, _, error = run(*command.format("runs/typo").split())
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith("solo: cannot ")
    assert "runs/typo: no such folder, and from the hub: " in line


def test_truncated_weights_are_a_one_line_error(run, tmp_path):
    make_solo("qwen3").save(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    code, _, error = run("generate", "--model", tmp_path / "model", "--prompt", "hi")
    assert code == 2
    assert len(error.strip().splitlines()) == 1


def test_generate_prints_answer_and_json_metrics(run, solo_folder, tmp_path, picture):
    picture(96, 64).save(tmp_path / "x.jpg")
    arguments = ["generate", "--model", solo_folder, "--image", tmp_path / "x.jpg", "--prompt", "what?"]
    code, streamed, _ = run(*arguments, "--max-new-tokens", 8)
    assert code == 0
    code, out, _ = run(*arguments, "--max-new-tokens", 8, "--json")
    result = json.loads(out)
    assert result["answer"] == streamed.strip()
    assert result["num_patches"] == 6
    assert 0 < result["answer_tokens"] <= 8
    assert 0 < result["seconds"]["first_token"] <= result["seconds"]["all"]


def test_prompt_with_a_surrogate_is_a_one_line_error(run, solo_folder, tmp_path, picture):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    arguments = ["generate", "--model", solo_folder, "--prompt", "cut \ud83d"]
    for more in ([], ["--json"], ["--images", tmp_path / "images", "--out", tmp_path / "out.jsonl"]):
        code, out, error = run(*arguments, *more)
        assert (code, out) == (2, "")
        assert len(error.strip().splitlines()) == 1
        assert "character 4" in error
    assert not (tmp_path / "out.jsonl").exists()


def test_json_output_escapes_non_utf8_file_names(solo_folder, tmp_path, picture):
    """Run the command as a process, whose stdout rejects surrogates."""
    name = str(tmp_path / "caf\udce9.png")  # é in Latin-1
    picture().save(name)
    arguments = ["generate", "--model", str(solo_folder), "--image", name, "--prompt", "hi", "--json"]
    more = ["--max-new-tokens", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "solo_vlm", *arguments, *more], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["images"] == [name]


def test_init_from_a_folder(run, tmp_path):
    llm, tokenizer = make_llm("mistral")
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    code, out, _ = run("init", "--llm", tmp_path / "llm", "--out", tmp_path / "solo", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["llm"] == "mistral"
    assert facts["patch_embedding"] == 3072 * 48
    code, _, error = run("init", "--llm", tmp_path / "llm", "--out", tmp_path / "solo")
    assert code == 2
    assert "exists already" in error
    code, _, error = run("init", "--llm", tmp_path / "nowhere", "--out", tmp_path / "other")
    assert code == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("rank", ["", "0", "none"])
def test_any_variable_of_a_launcher_leaves_errors_to_one_line(run, monkeypatch, tmp_path, rank):
    monkeypatch.setenv("RANK", rank)
    code, _, error = run("train", tmp_path / "none.yaml")
    assert code == 2
    assert error.startswith("solo: no recipe")


def test_train_rejects_an_invalid_recipe(run, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: a\nout: b\nsteps: 1\ndata: {sources: [{path: x}], sequence_lenght: 4}\n"
    )
    code, _, error = run("train", tmp_path / "r.yaml")
    assert code == 2
    assert "did you mean sequence_length" in error
    code, _, error = run("train")
    assert code == 2


def test_quickstart_rejects_a_foreign_folder(run, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    code, _, error = run("quickstart", "--out", tmp_path)
    assert code == 2
    assert "not from a quickstart" in error
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_debug_shows_the_traceback():
    done = subprocess.run(
        [Path(sys.executable).with_name("solo"), "--debug", "train", "nowhere"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(("size", "grid"), [("64", (1, 2)), ("96x64", (2, 3))])
def test_init_sets_image_options(run, tmp_path, size, grid):
    llm, tokenizer = make_llm()
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    arguments = ("init", "--llm", tmp_path / "llm", "--out", tmp_path / "solo", "--image-size", size)
    code, _, error = run(*arguments, "--image-attention", "bidirectional", "--image-positions", "2d")
    assert code == 0, error
    processor = SoloImageProcessor.from_pretrained(tmp_path / "solo")
    assert processor.get_patch_grid(40, 80) == grid
    config = SoloConfig.from_pretrained(tmp_path / "solo")
    assert (config.image_attention, config.image_positions) == ("bidirectional", "2d")


@pytest.mark.parametrize("size", ["1000", "0", "64x", "64x50", "wide"])
def test_init_rejects_sizes_that_are_not_multiples_of_the_patch(run, tmp_path, size):
    code, _, error = run("init", "--llm", tmp_path, "--out", tmp_path / "solo", "--image-size", size)
    assert code == 2
    assert "--image-size" in error
    assert not (tmp_path / "solo").exists()


def test_table_wider_than_the_terminal_keeps_its_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    numbers = ("a column of numbers", "and another one", "and the last one")
    rows = [("some/file.parquet", "1,234,567", "2", "3"), ("total", "4", "5", "6")]
    print_table("title", ("name", *numbers), rows)
    out = capsys.readouterr().out
    assert all(text in out for text in ("name", "some/file.parquet", "total", "1,234,567", *numbers))


def test_image_with_many_warnings_does_not_fill_stderr(tmp_path):
    """Pillow warns about each tag."""
    (tmp_path / "image.png").write_bytes(
        png_file(64, 64, before=png_chunk(b"eXIf", exif_that_overlaps(500, 99)))
    )
    command = [sys.executable, "-m", "solo_vlm", "inspect", "--image", "image.png", "--out", "grid.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
