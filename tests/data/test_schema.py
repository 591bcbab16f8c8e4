"""What a sample may look like, and what is said of one that may not."""

from __future__ import annotations

import pytest

from solo_vlm.data.schema import SampleError, parse_sample


def user(*content):
    return {"messages": [{"role": "user", "content": list(content)}]}


TEXT = {"type": "text", "text": "hi"}
IMAGE = {"type": "image", "text": None}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": b"jpeg"}, b"jpeg"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "url": "https://x/a.png"}, "https://x/a.png"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, "data:image/png;base64,AA"),
        ({"type": "image_url", "image_url": "https://x/a.png"}, "https://x/a.png"),
    ],
)
def test_an_image_part_may_carry_its_image(part, source):
    sample = parse_sample(user(part, TEXT))
    assert sample.images == [source]
    assert sample.messages[0]["content"] == [{"type": "image"}, TEXT]


@pytest.mark.parametrize(
    "stored", [b"jpeg", "a.png", {"bytes": b"jpeg", "path": None}, {"bytes": None, "path": "a.png"}]
)
def test_image_parts_take_the_rows_images_in_order(stored):
    sample = parse_sample({**user(IMAGE, TEXT, IMAGE), "images": [stored, "second.png"]})
    assert sample.images[0] in (b"jpeg", "a.png")
    assert sample.images[1] == "second.png"


def test_a_string_is_one_text_part():
    row = {"id": 7, "messages": [{"role": "assistant", "content": "hi"}], "other": 1}
    sample = parse_sample(row)
    assert sample.messages == [{"role": "assistant", "content": [TEXT]}]
    assert sample.id == "7"


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({}, "schema", "messages"),
        ({"messages": []}, "schema", "messages"),
        ({"messages": "not JSON: ..."}, "schema", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "schema", "messages.0.role"),
        (user({"type": "video"}), "schema", "messages.0.content.0"),
        (user({"type": "text", "text": None}), "schema", "messages.0.content.0.text"),
        (user(IMAGE), "image-count", "more image parts than images"),
        ({**user(TEXT), "images": ["a.png"]}, "image-count", "more images than image parts"),
    ],
)
def test_a_broken_row_says_where(row, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        parse_sample(row)
    assert error.value.reason == reason
