"""`solo data preview`: first rows of a source, with and without a model."""

from __future__ import annotations

import json

import pytest
from tests.data.formats.test_converters import turns

ROWS = [
    {"id": 1, "image": "cat.png", "conversations": turns("<image>\nwhat?", "red circle"), "stars": 5},
    {"id": 2, "image": "gone.png", "conversations": turns("<image>\nwhat?", "blue"), "stars": 4},
    {"id": 3, "conversations": turns("what?", "seven"), "stars": 1},
    {"id": 4, "image": "sea.png", "conversations": turns("what?\n<image>", "blue"), "stars": 3},
    {"id": 5, "conversations": turns("what?", "red"), "stars": 3},
]


@pytest.fixture
def folder(tmp_path, picture, monkeypatch):
    (tmp_path / "photos").mkdir()
    picture(640, 427).save(tmp_path / "photos/cat.png")
    picture(96, 64).save(tmp_path / "photos/sea.png")
    (tmp_path / "chats.json").write_text(json.dumps(ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_preview_shows_parts_in_order_and_skipped_rows(run_data, folder):
    code, out, error = run_data("preview", "chats.json", "--images", "photos")
    assert code == 0
    assert "chats.json: reading rows as llava" in " ".join(error.split())
    where = f"{folder}/chats.json, block at byte 1, row"
    assert out.replace("\n", "").replace(" ", "") == (
        "chats.json: rows read as llava; columns id, image, conversations, stars; not read: stars"
        f"{where} 0"
        "user: image of 640 x 427 pixels, 14 x 20 patches, 295 tokens"
        "user: what?"
        "assistant (supervised): red circle"
        f"{where} 1"
        f"skipped: image: {folder}/photos/gone.png: No such file or directory"
        f"{where} 2"
        "user: what?"
        "assistant (supervised): seven"
        f"{where} 3"
        "user: what?"
        "user: image of 96 x 64 pixels, 2 x 3 patches, 9 tokens"
        "assistant (supervised): blue"
    ).replace(" ", "")


def test_preview_with_a_model_marks_supervised_tokens(run_data, folder, solo_folder):
    code, out, _ = run_data(
        "preview", "chats.json", "--images", "photos", "--model", solo_folder, "--rows", 1
    )
    assert code == 0
    assert "(295 vision tokens)" in out
    code, out, _ = run_data(
        "preview", "chats.json", "--images", "photos", "--model", solo_folder, "--rows", 1, "--json"
    )
    (row,) = json.loads(out)["rows"]
    assert [run["kind"] for run in row["runs"]] == ["context", "vision", "context", "supervised"]
    assert row["runs"][1]["tokens"] == 295
    assert row["runs"][3]["text"].strip() == "red circle</s>"


def test_preview_counts_filtered_rows_and_renames_columns(run_data, folder):
    code, out, _ = run_data(
        "preview", "chats.json", "--images", "photos", "--filter", "stars >= 3", "--rows", 2, "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert (found["format"], found["filtered"]) == ("llava", 1)
    assert [row["reason"] for row in found["rows"]] == [None, "image", None]
    (folder / "x.jsonl").write_text(json.dumps({"photo": "sea.png", "title": "blue"}))
    arguments = ["x.jsonl", "--images", "photos", "--columns", "image=photo", "--columns", "text=title"]
    code, out, _ = run_data("preview", *arguments, "--json")
    assert code == 0
    assert [part["type"] for part in json.loads(out)["rows"][0]["parts"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "no data files at nowhere.json"),
        (["empty.jsonl"], "empty.jsonl has no rows"),
        (["chats.json", "--format", "lava"], "chats.json: format: "),
        (["chats.json", "--format", "captions"], "but captions has image"),
        (["chats.json", "--columns", "image"], "--columns image: expected"),
        (["chats.json", "--filter", "stars >"], "is not an expression"),
        (["chats.json", "--images", "pictures"], "no folder pictures"),
    ],
)
def test_user_error_is_one_line(run_data, folder, arguments, message):
    (folder / "empty.jsonl").touch()
    code, out, error = run_data("preview", *arguments)
    assert (code, out) == (2, "")
    (line,) = error.strip().splitlines()
    assert message in line
