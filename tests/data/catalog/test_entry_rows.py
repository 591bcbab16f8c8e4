"""Converters on rows in the original raw formats, including unusual ones."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.catalog.catalog_rows import FINETUNING, JPEG, OPEN, PRETRAINING, USUAL, cauldron, llava

from solo_vlm.data.catalog.entry import DATA_SETS, get
from solo_vlm.data.catalog.raw_folder import RawFolder
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.utils.errors import SoloError

FIELDS = sorted({field for row, _ in USUAL.values() for field in row} | {"role", "content", "from", "value"})


def words(row: dict[str, Any]) -> str:
    """Return a sample in short form: `role:text` with <> for an image, and turns separated by |."""
    sample = parse_sample(row)
    assert all(sample.images)
    return "|".join(
        f"{message['role'][0]}:" + "".join(part.get("text", "<>") for part in message["content"])
        for message in sample.messages
    )


def convert(name: str, row: dict[str, Any], raw: Path) -> dict[str, Any]:
    return get(name).convert(row, RawFolder(raw))


def test_every_data_set_has_a_test_row():
    assert list(USUAL) == list(DATA_SETS)
    assert (len(PRETRAINING), len(FINETUNING), len(OPEN)) == (12, 33, 10)


@pytest.mark.parametrize("name", USUAL)
def test_typical_row_is_converted(name, raw):
    row, expected = USUAL[name]
    sample = convert(name, row, raw)
    assert words(sample) == expected
    assert all(image["bytes"] in (JPEG, None) for image in sample["images"])


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_sample_is_one_assistant_turn(name, raw):
    messages = convert(name, USUAL[name][0], raw)["messages"]
    assert [message["role"] for message in messages] == ["assistant"]


@pytest.mark.parametrize("name", USUAL)
def test_row_of_another_format_is_rejected(name, raw):
    with pytest.raises(SampleError):
        convert(name, {"unknown": 1}, raw)


ODD: list[tuple[str, dict[str, Any], str]] = [
    # The first of several class names; tars of single classes use another extension.
    ("imagenet-21k", {"key": "n07747607_3", "jpeg": JPEG}, "a:<>blood orange"),
    # The URL list itself, and img2dataset's parquet files.
    ("capfusion", {"image_url": "https://x/1.jpg", "laion_2b": "fox!", "capsfusion": "A fox."}, "a:<>A fox."),
    ("capfusion", {"key": "1", "jpg": JPEG, "caption": "A fox.", "status": "success"}, "a:<>A fox."),
    ("cc3m", {"columns": ["a cat", "https://x/1.jpg"]}, "a:<>a cat"),
    ("cc3m", {"key": "1", "png": JPEG, "txt": " a cat \n"}, "a:<>a cat"),
    ("detailed-captions", {"img_id": "000000012.jpg", "detailed_caption": "A bus."}, "a:<>A bus."),
    (
        "dvqa",
        {
            "images": [{"bytes": JPEG, "path": "x.png"}],
            "texts": [
                {"user": "How many bars?", "assistant": "3", "source": "dvqa"},
                {"user": "Largest?", "assistant": "b", "source": "dvqa"},
            ],
        },
        "a:<>How many bars?\n3\n\nLargest?\nb",
    ),
    # Two images and several questions.
    (
        "iconqa",
        {
            "images": [{"bytes": JPEG, "path": None}, {"bytes": JPEG, "path": None}],
            "texts": [
                {"user": "Which is it?", "assistant": "A", "source": "iconqa"},
                {"user": "Sure?", "assistant": "Yes", "source": "iconqa"},
            ],
        },
        "u:<><>Which is it?|a:A|u:Sure?|a:Yes",
    ),
    # Only a path on the machine that made the rows.
    (
        "okvqa",
        {
            "images": [{"bytes": None, "path": "/data/coco/000000012.jpg"}],
            "texts": [{"user": "Sport?", "assistant": "Race.", "source": "okvqa"}],
        },
        "u:<>Sport?|a:Race.",
    ),
    ("laion-gpt4v", {"caption": "A ring.", "link": "https://x/1", "image": {"bytes": JPEG}},
     "u:<>Describe this image in detail.|a:A ring."),
    # Without a placeholder, the image comes first.
    ("sharegpt4v", llava("sam/images/sa_1.jpg", "What is it?", "A harbor."), "u:<>What is it?|a:A harbor."),
    # A placeholder in the middle of a later turn.
    (
        "release-sft",
        llava("gqa/images/2327515.jpg", "Hello.", "Hi.", "In <image> who is left?", "Ann."),
        "u:Hello.|a:Hi.|u:In<>who is left?|a:Ann.",
    ),
    # No image; all turns are bare strings.
    ("release-sft", {"conversations": ["2 + 2?", "4", "and 3?", "7"]}, "u:2 + 2?|a:4|u:and 3?|a:7"),
    (
        "release-sft",
        {"image": ["000000012.jpg", "cauldron/vqav2_7.jpg"], "conversations": ["<image><image>Same?", "No."]},
        "u:<><>Same?|a:No.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "expected"), ODD)
def test_unusual_row_is_converted(name, row, expected, raw):
    assert words(convert(name, row, raw)) == expected


REJECTED: list[tuple[str, dict[str, Any], str]] = [
    ("imagenet-21k", {"key": "n99999999_1", "jpg": JPEG}, "class-unknown"),
    ("imagenet-21k", {"key": "n02084071_1", "cls": b"1"}, "image-missing"),
    ("slimpajama", {"text": "Buy!", "meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}}, "web-crawl"),
    ("slimpajama", {"text": " \n", "meta": {"redpajama_set_name": "RedPajamaBook"}}, "text-empty"),
    ("slimpajama", {"text": "Buy!", "meta": None}, "raw-schema"),
    ("capfusion", {"key": "1", "caption": "A fox.", "status": "failed_to_download", "error_message": "404"},
     "download-failed"),
    ("capfusion", {"image_url": "https://x/1.jpg", "capsfusion": None}, "raw-schema"),
    ("cc3m", {"key": "1", "txt": "a cat"}, "image-missing"),
    ("cc3m", {"columns": ["a cat"]}, "image-missing"),
    ("cc3m", {"columns": []}, "raw-schema"),
    ("websight", {"image": {"bytes": JPEG, "path": None}, "text": None}, "text-empty"),
    ("detailed-captions", {"img_id": "7", "detailed_caption": "A bus."}, "image-missing"),
    ("llavar", llava("other.jpg", "Read it.\n<image>", "ART"), "image-missing"),
    ("llavar", llava("../../secret.jpg", "Read it.\n<image>", "ART"), "image-path"),
    ("allava-laion", {"id": "1", "image": "x.jpeg", "conversations": []}, "no-answer"),
    ("dvqa", {"images": [{"bytes": JPEG}], "texts": []}, "no-answer"),
    ("vqav2", {"images": [], "texts": [{"user": "Q", "assistant": "A", "source": "s"}]}, "image-missing"),
    ("vqav2", {"images": [{"bytes": None, "path": None}], "texts": [{"user": "Q", "assistant": "A"}]},
     "image-missing"),
    ("vqav2", cauldron("Q", None, "vqav2"), "text"),  # type: ignore[arg-type]
    ("vqav2", {"images": None, "texts": [{"user": "Q", "assistant": "A"}]}, "image-missing"),
    ("codeact-general", {"id": "1", "conversations": [{"role": "tool", "content": "x"}]}, "role"),
    ("ultrachat", {"prompt_id": "1", "messages": [{"role": "user", "content": "x"}]}, "no-answer"),
    ("ultrachat", {"prompt_id": "1", "messages": [{"role": "assistant", "content": "x"}]}, "no-question"),
    ("ultrainteract", {"instruction": "x", "response": "", "id": "1"}, "text-empty"),
    ("gqa", llava("coco/train2017/000000033471.jpg", "<image>\nQ", "A"), "other-data-set"),
    ("gqa", {"id": "1", "conversations": ["Q", "A"]}, "other-data-set"),
    ("sharegpt4v", llava("sam/images/sa_1.jpg", "<image><image>\nQ", "A"), "image-count"),
    ("release-sft", {"conversations": ["<image>\nQ", "A"]}, "image-count"),
    ("release-sft", {"image": 7, "conversations": ["Q", "A"]}, "image-path"),
    ("release-sft", {"conversations": [{"from": "human", "value": None}, "A"]}, "text"),
    ("release-sft", {"conversations": [["Q"], "A"]}, "raw-schema"),
    ("release-sft", {"image": "aGVsbG8" * 99, "conversations": ["Q", "A"]}, "image-path"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "reason"), REJECTED)
def test_broken_row_is_rejected_with_a_reason(name, row, reason, raw):
    with pytest.raises(SampleError) as error:
        convert(name, row, raw)
    assert error.value.reason == reason


def rows_of(inner):
    return st.dictionaries(st.sampled_from(FIELDS), inner, max_size=8)


simple = st.none() | st.booleans() | st.integers() | st.binary(max_size=8) | st.text(max_size=300)
values = st.recursive(simple, lambda inner: st.lists(inner, max_size=3) | rows_of(inner), max_leaves=8)


@pytest.mark.parametrize("name", {get(name).converter: name for name in USUAL}.values())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(row=rows_of(values))
def test_any_row_is_converted_or_rejected(name, raw, row):
    """Rows have the expected fields with arbitrary values."""
    usual = USUAL[name][0]
    for attempt in (row, usual | row):
        with contextlib.suppress(SampleError):
            parse_sample(convert(name, attempt, raw))


def test_empty_image_file_counts_as_missing(raw):
    (raw / "sam/images/sa_1.jpg").write_bytes(b"")
    with pytest.raises(SampleError, match="empty or not in"):
        convert("sharegpt4v", USUAL["sharegpt4v"][0], raw)


def test_images_may_be_in_a_separate_folder(raw):
    (raw / "images").mkdir()
    (raw / "images" / "7.jpg").write_bytes(JPEG)
    sample = convert("detailed-captions", {"img_id": 7, "detailed_caption": "A bus."}, raw)
    assert sample["images"][0]["bytes"] == JPEG


def test_missing_class_list_is_reported(tmp_path):
    with pytest.raises(SoloError, match=r"mapping\.txt is missing"):
        convert("imagenet-21k", {"key": "n02084071_1", "jpg": JPEG}, tmp_path)


def test_id_is_kept(raw):
    assert convert("llavar", USUAL["llavar"][0], raw)["id"] == "row-1"
    assert convert("ultrachat", USUAL["ultrachat"][0], raw)["id"] == "ab12"
    assert convert("vqav2", USUAL["vqav2"][0], raw)["id"] is None


def test_unknown_name_suggests_the_closest():
    with pytest.raises(SoloError, match="did you mean capfusion"):
        get("capsfusion")


def test_images_in_any_form_are_converted(tmp_path):
    text = base64.b64encode(JPEG + bytes(40)).decode()
    (tmp_path / "a b.jpg").write_bytes(JPEG)
    folder = RawFolder(tmp_path)
    for value in (
        "a b.jpg",
        "file:a b.jpg",
        f"file://{tmp_path}/a%20b.jpg",
        {"path": "a b.jpg"},
        {"bytes": JPEG},
    ):
        assert folder.image(value) == {"bytes": JPEG, "path": None}
    for value in (text, {"bytes": text}, f"data:;base64,{text}"):
        assert folder.image(value) == {"bytes": None, "path": f"data:;base64,{text}"}
