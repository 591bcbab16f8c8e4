"""Answers about a folder of images: complete, ordered, resumable after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solo_vlm.generate import GenerationPipeline, open_images, user_turn
from solo_vlm.generate.folder import answer_folder, find_images
from solo_vlm.utils.errors import SoloError

REQUEST = {"prompt": "what is this?", "max_new_tokens": 4}


@pytest.fixture
def photos(tmp_path, picture):
    """Return images of several sizes in two folders, with a broken, a hidden and a text file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for number in (1, 2, 10):
        picture(32 * number, 64, seed=number).save(folder / f"img{number}.png")
        picture(64, 32 * number, seed=number).save(folder / "more" / f"{number} é.JPG", "JPEG")
    picture().save(folder / ".hidden" / "img.png")
    (folder / "img3.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image")
    return folder


ORDER = [
    *("img1.png", "img2.png", "img3.png", "img10.png"),
    *("more/1 é.JPG", "more/2 é.JPG", "more/10 é.JPG"),
]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_images_are_found_in_natural_order(photos, tmp_path):
    assert find_images(photos) == ORDER
    (tmp_path / "none").mkdir()
    with pytest.raises(SoloError, match="no images in"):
        find_images(tmp_path / "none")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_image_is_answered(solo_folder, photos, tmp_path, batch_size):
    pipeline = GenerationPipeline.from_pretrained(solo_folder)
    done = []
    out = tmp_path / "answers.jsonl"
    counts = answer_folder(
        pipeline, ORDER, photos, REQUEST, out, batch_size, lambda *state: done.append(state)
    )
    assert vars(counts) == {"answers": 6, "errors": 1, "new": 7}
    assert done[-1] == (7, 7)
    written = lines(out)
    assert [line["image"] for line in written] == ORDER
    for line in written:
        assert {name: line[name] for name in REQUEST} == REQUEST
        if line["image"] == "img3.png":
            assert "img3.png" in line["error"] and "answer" not in line
        else:
            chat = [user_turn("what is this?", open_images([str(photos / line["image"])]))]
            assert line["answer"] == pipeline.answer([chat], 4)[0]


def test_killed_run_resumes(solo_folder, photos, tmp_path):
    pipeline = GenerationPipeline.from_pretrained(solo_folder)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    answer_folder(pipeline, ORDER, photos, REQUEST, whole)
    text = whole.read_bytes().splitlines(keepends=True)
    encoded = []
    encode = pipeline.encode
    pipeline.encode = lambda chats: encoded.extend(chats) or encode(chats)
    for kept, partial in ((0, 0), (2, 30), (6, 1), (7, 0)):
        out.write_bytes(b"".join(text[:kept]) + (text[kept][:partial] if partial else b""))
        encoded.clear()
        counts = answer_folder(pipeline, ORDER, photos, REQUEST, out)
        assert out.read_bytes() == whole.read_bytes()
        assert counts.new == 7 - kept
        assert len(encoded) == counts.new - (kept < 3)  # no prompt is encoded for the broken image


def test_file_of_another_request_is_rejected(solo_folder, photos, tmp_path):
    out = tmp_path / "answers.jsonl"
    pipeline = GenerationPipeline.from_pretrained(solo_folder)
    answer_folder(pipeline, ORDER, photos, REQUEST, out)
    before = out.read_bytes()
    with pytest.raises(SoloError, match=r"prompt 'what is this\?', now 'and this\?'"):
        answer_folder(pipeline, ORDER, photos, {**REQUEST, "prompt": "and this?"}, out)
    assert out.read_bytes() == before
    out.write_text("[1]\n")
    with pytest.raises(SoloError, match=r"answers\.jsonl"):
        answer_folder(pipeline, ORDER, photos, REQUEST, out)


def test_image_beyond_the_context_is_recorded_as_error(solo_folder, photos, tmp_path, picture):
    picture(960, 960).save(photos / "img2.png")  # 900 patches for a context of 512
    pipeline = GenerationPipeline.from_pretrained(solo_folder)
    answer_folder(pipeline, ORDER, photos, REQUEST, tmp_path / "answers.jsonl")
    errors = {line["image"]: line["error"] for line in lines(tmp_path / "answers.jsonl") if "error" in line}
    assert errors.keys() == {"img2.png", "img3.png"}
    assert "context" in errors["img2.png"]


def test_generate_command_for_a_folder(run, solo_folder, photos, tmp_path):
    arguments = ["generate", "--model", solo_folder, "--images", photos, "--prompt", "what?"]
    code, out, error = run(*arguments, "--out", tmp_path / "a.jsonl", "--max-new-tokens", 2)
    assert code == 0
    assert out.startswith("6 answers in") and "1 could not be" in out
    code, out, _ = run(*arguments, "--out", tmp_path / "a.jsonl", "--max-new-tokens", 2, "--json")
    assert json.loads(out) == {"out": str(tmp_path / "a.jsonl"), "answers": 6, "errors": 1, "new": 0}
    for wrong in ([], ["--out", tmp_path / "b.jsonl", "--temperature", 1]):
        code, out, error = run(*arguments, *wrong)
        assert (code, len(error.strip().splitlines())) == (2, 1)
    code, _, error = run(
        "generate", "--model", solo_folder, "--prompt", "what?", "--out", tmp_path / "b.jsonl"
    )
    assert code == 2 and "--images" in error


@pytest.mark.slow
def test_command_resumes_after_sigkill(solo_folder, tmp_path, picture):
    folder, out = tmp_path / "photos", tmp_path / "answers.jsonl"
    folder.mkdir()
    for number in range(30):
        picture(64, 64, seed=number).save(folder / f"{number}.png")
    command = [
        *(Path(sys.executable).with_name("solo"), "generate", "--model", solo_folder, "--images", folder),
        *("--prompt", "what?", "--out", out, "--batch-size", "1", "--max-new-tokens", "16"),
    ]
    process = subprocess.Popen(command)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = out.read_bytes()
    assert 3 <= kept.count(b"\n") < 30
    subprocess.run(command, check=True)
    assert [line["image"] for line in lines(out)] == [f"{number}.png" for number in range(30)]
    assert set(kept.split(b"\n")[:-1]) <= set(out.read_bytes().split(b"\n"))
