"""Supported row formats, and errors about others."""

from __future__ import annotations

import pytest

from solo_vlm.data.formats.row_format import RowFormat
from solo_vlm.data.sample import SampleError, parse_sample


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
def test_image_part_may_contain_its_image(part, source):
    sample = parse_sample(user(part, TEXT))
    assert sample.images == [source]
    assert sample.messages[0]["content"] == [{"type": "image"}, TEXT]


@pytest.mark.parametrize(
    "stored", [b"jpeg", "a.png", {"bytes": b"jpeg", "path": None}, {"bytes": None, "path": "a.png"}]
)
def test_image_parts_take_the_images_of_the_row_in_order(stored):
    sample = parse_sample({**user(IMAGE, TEXT, IMAGE), "images": [stored, "second.png"]})
    assert sample.images[0] in (b"jpeg", "a.png")
    assert sample.images[1] == "second.png"


def test_string_content_is_one_text_part():
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
def test_broken_row_error_names_the_field(row, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        parse_sample(row)
    assert error.value.reason == reason


# --- images without a separate part -------------------------------------------------------------------

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def chat(question: object, *more: dict, **columns: object) -> dict:
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "red"},
            *more,
        ],
        **columns,
    }


def shown(row: dict) -> tuple[list[str], list]:
    """Return the texts of the turns with [] for an image, and the images."""
    sample = parse_sample(row)
    texts = ["|".join(part.get("text", "[]") for part in m["content"]) for m in sample.messages]
    return texts, sample.images


@pytest.mark.parametrize(
    ("value", "image"),
    [
        ("a.png", "a.png"),
        (b"jpeg", b"jpeg"),
        ({"bytes": b"jpeg", "path": "a.png"}, b"jpeg"),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"path": "a.png"}, "a.png"),
        ({"url": "https://x/a.png"}, "https://x/a.png"),
        ({"bytes": "/9j/AAAA", "path": None}, "data:;base64,/9j/AAAA"),
        (["a.png"], "a.png"),
    ],
)
def test_image_column_comes_before_the_users_first_text(value, image):
    assert shown(chat("What color?", image=value)) == (["Be brief.", "[]|What color?", "red"], [image])
    document = {"messages": [{"role": "assistant", "content": "a red dot"}], "image": value}
    assert shown(document) == (["[]|a red dot"], [image])


@pytest.mark.parametrize("columns", [{"image": ["a", "b"]}, {"images": ["a", "b"]}])
def test_images_replace_placeholders_in_text(columns):
    more = ({"role": "user", "content": "And <image>?"}, {"role": "assistant", "content": "blue"})
    row = chat("<image>\nWhat color?", *more, **columns)
    assert shown(row) == (["Be brief.", "[]|What color?", "red", "And|[]|?", "blue"], ["a", "b"])


def test_image_column_fills_an_empty_image_part():
    assert shown(chat([TEXT, IMAGE], image="a.png")) == (["Be brief.", "hi|[]", "red"], ["a.png"])
    assert shown(chat([TEXT, IMAGE], image="a.png", images=["a.png"]))[1] == ["a.png"]


def test_message_may_have_its_own_images():
    first = {"role": "user", "content": "What?", "images": ["a.png"]}
    second = {"role": "user", "content": "This <image> or <image>?", "image": ["b.png", "c.png"]}
    answer = {"role": "assistant", "content": "red"}
    texts, images = shown({"messages": [first, answer, second, answer]})
    assert texts == ["[]|What?", "red", "This|[]|or|[]|?", "red"]
    assert images == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("empty", [None, float("nan"), "", b"", [], {"bytes": None, "path": None}])
@pytest.mark.parametrize("column", ["image", "images"])
def test_empty_image_column_is_ignored(column, empty):
    assert shown(chat("What?", **{column: empty})) == (["Be brief.", "What?", "red"], [])


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        (chat("What?", images=["a.png"]), "image-count", "more images than image parts"),
        (chat("<image> or <image>?", image="a.png"), "image-count", "2 <image> placeholders for 1 images"),
        (chat([{"type": "image", "path": "b.png"}, TEXT], image="a.png"), "image-count", "more images than"),
        (chat("What?", image="a.png", images=["b.png"]), "image-count", "image and images differ"),
        (chat("<image>\nWhat?", images=[]), "image-count", "images is empty: there is no image"),
        (chat("<image>\nWhat?", image=None), "image-count", "image is empty: there is no image"),
        (chat("What?", images=["a.png", None]), "schema", "1 of 2 images are empty"),
        (chat("What?", images=[{"bytes": None, "path": None}]), "schema", "1 of 1 images are empty"),
        (chat("What?", image=7), "schema", "an image is bytes, text or a struct"),
        (chat("What?", image=0), "schema", "an image is bytes, text or a struct"),
        (chat("What?", image={"width": 3}), "schema", "an image is bytes, text or a struct"),
        (chat([{**TEXT, "path": "a.png"}]), "schema", "a text part has an image in path"),
        (chat([{"type": "image", "data": "b.png"}, TEXT], image="a.png"), "schema", "has an image in data"),
        (
            chat([{"type": "image", "bytes": PNG_HEAD}, TEXT], image="a.png"),
            "schema",
            "has an image in bytes",
        ),
        (
            chat([{"type": "image", "source": {"data": "iVBORw0KGgo" + "A" * 50}}, TEXT], image="a.png"),
            "schema",
            "has an image in source",
        ),
        (chat([{"type": "image_url", "image_url": {}}, TEXT]), "image-count", "more image parts"),
        (chat([{"type": "image_url", "image_url": {"url": None}}, TEXT]), "image-count", "more image parts"),
    ],
)
def test_ambiguous_images_are_rejected(row, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        parse_sample(row)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "value",
    [
        PNG_HEAD,
        {"bytes": PNG_HEAD, "path": None},
        [{"bytes": b"\xff\xd8\xff\xe0", "path": None}],
        "train/0001.JPG",
        "https://x.org/0001.webp?size=large",
        "data:image/png;base64,AAAA",
        "iVBORw0KGgo" + "A" * 50,
    ],
)
def test_unknown_column_that_looks_like_an_image_is_named(value):
    with pytest.raises(SampleError, match="photo looks like an image") as error:
        parse_sample(chat("What?", photo=value))
    assert error.value.reason == "image-column"
    row = chat("What?")
    row["messages"][1]["photo"] = value
    with pytest.raises(SampleError, match=r"messages\.1\.photo looks like an image"):
        parse_sample(row)
    assert shown(chat("What?", image="a.png", photo=value))[1] == ["a.png"]  # the row has its image


@pytest.mark.parametrize(
    "value", [None, 3, "web page", "https://x.org/page.html", b"bytes", [0.5] * 9, {"a": 1}, []]
)
def test_other_unknown_columns_are_ignored(value):
    assert shown(chat("What <image> tags are", meta=value))[1] == []


# --- invalid text and IDs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (float("nan"), None),
        (None, None),
        (1.5, "1.5"),
        (float("inf"), "inf"),
        (True, "True"),
        (10**30, "1" + "0" * 30),
        (b"a\xff", "a\\xff"),
        ("a\ud83d", "a\\ud83d"),
        ({"$oid": 1}, "{'$oid': 1}"),
    ],
)
def test_row_is_used_with_any_id(value, name):
    assert parse_sample(chat("What?", id=value)).id == name


@pytest.mark.parametrize(
    "row",
    [
        chat("cut \ud83d"),
        chat([{"type": "text", "text": "\udcff"}]),
        chat("What?", image="\ud83d.png"),
        chat([{"type": "image", "image_url": {"url": "https://x/\ud83d.png"}}]),
    ],
)
def test_lone_surrogate_error_is_printable(row):
    with pytest.raises(SampleError) as error:
        parse_sample(row)
    assert error.value.reason == "schema"
    assert "\\ud" in str(error.value)
    str(error.value).encode()


def talk(*turns: tuple[str, object], **more: object) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


@pytest.mark.parametrize(
    "turns",
    [
        [("assistant", "Hello."), ("user", "Q"), ("assistant", "A")],
        [("user", "Q"), ("user", "And?"), ("assistant", "A")],
        [("user", "Q"), ("system", "S"), ("assistant", "A")],
        [("system", ""), ("user", "Q"), ("assistant", "A")],
        [("user", [IMAGE | {"image": "a.png"}]), ("assistant", "A")],
        [("user", "Draw."), ("assistant", [IMAGE | {"image": "a.png"}])],
        [("system", [IMAGE | {"image": "a.png"}]), ("user", "Q"), ("assistant", "A")],
    ],
)
def test_order_of_turns_and_places_of_images_are_kept(turns):
    """What a chat template makes of them is the template's matter."""
    sample = parse_sample(talk(*turns))
    assert [message["role"] for message in sample.messages] == [role for role, _ in turns]
    kinds = [[part["type"] for part in message["content"]] for message in sample.messages]
    assert kinds == [["text"] if isinstance(content, str) else ["image"] for _, content in turns]


@pytest.mark.parametrize("empty", ["", " \n", [], [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_empty_turn_is_rejected(role, empty):
    other = {"user": "assistant", "assistant": "user"}[role]
    with pytest.raises(SampleError, match=f"text-empty: turn 1, of the {role}, is empty"):
        parse_sample(talk((other, "Hi"), (role, empty)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_calls", [{"function": {"name": "f"}}]),
        ("function_call", {"name": "f"}),
        ("reasoning_content", "Hmm."),
        ("weight", 0),
        ("weight", 0.5),
        ("train", False),
        ("loss", False),
    ],
)
def test_turn_whose_content_is_not_all_or_not_to_be_learned_is_rejected(name, value):
    row = talk(("user", "Q"), ("assistant", "A"))
    for empty in {"weight": (None, 1), "reasoning_content": (None, "", True)}.get(name, (None,)):
        row["messages"][1][name] = empty
        assert parse_sample(row).messages[1]["content"] == [{"type": "text", "text": "A"}]
    row["messages"][1][name] = value
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", name: value}]
    for given, read in ((row, parse_sample), ({"conversations": turns}, RowFormat("sharegpt"))):
        with pytest.raises(SampleError, match=f"^turn: {name} .*not read"):
            read(given)
    row["messages"] = [{"role": "user", "content": "Q", name: value}, {"role": "assistant", "content": "A"}]
    assert len(parse_sample(row).messages) == 2  # as in SlimOrca, whose questions have the weight 0


@pytest.mark.parametrize(
    "mark",
    ["<|image_1|>", "<|image|>", "<image_1>", "<image 2>", "<ImageHere>", "<start_of_image>", "[IMG]",
     "<|vision_start|><|image_pad|><|vision_end|>", "<image_placeholder>", "<img>a.png</img>", "<video>"],
)  # fmt: skip
def test_placeholder_of_another_program_is_not_trained_as_text(mark):
    row = talk(("user", f"What is in {mark}?"), ("assistant", "A cat."), image="a.png")
    with pytest.raises(SampleError, match=r"image-count: .* is not read as an image's place"):
        parse_sample(row)
    answer = talk(("user", "Write HTML."), ("assistant", f"<p>{mark}</p>"), image="a.png")
    assert len(parse_sample(answer).images) == 1
    assert parse_sample(talk(("user", f"What does {mark} mean?"), ("assistant", "A place."))).images == []
