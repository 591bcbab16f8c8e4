"""Converters: one function per format of raw rows, from a row to a sample row."""

from __future__ import annotations

from typing import Any

from solo_vlm.data.formats.rows import (
    RawRow,
    SampleRow,
    Turn,
    conversation,
    document,
    field,
    image,
    list_field,
    parts,
    role,
    source_of,
    text,
)
from solo_vlm.data.sample import IMAGE_PLACEHOLDER, SampleError, check_turn
from solo_vlm.data.values import COLUMNS, ImageSource

TURNS = ("conversations", "messages", "conversation")
"""Columns that may contain the turns of a chat; the first one is used."""

CAPTION_IMAGES = (*COLUMNS, "img", "jpg", "jpeg", "png", "webp", "image_path", "file_name", "image_url")
"""Columns that may contain the image of a caption; the first filled one is used."""

CAPTION_TEXTS = ("text", "caption", "txt")
"""Columns that may contain a caption; those that are filled must be equal."""

QUESTIONS = {
    "instruction": ("output", "response"),
    "query": ("response",),
    "question": ("answer",),
    "prompt": ("completion", "response"),
}
"""Columns that may contain a question, with those that may contain its answer."""

_FIRST_OPTIONS = ("A", "B")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


def samples(row: Any) -> SampleRow:
    """Return a row of the sample schema unchanged, and one of the original SOLO data in that schema.

    The latter is `{"id", "conversations": [turn, ...]}`, a list of turns, or a single turn. A turn has `role`
    and `content`: a string, or parts of text and `image_url`.
    """
    if isinstance(row, list):
        return {"messages": row}
    if not isinstance(row, dict):
        raise SampleError("json", "not an object")
    if "messages" in row:
        return row
    if _are_turns(row.get("conversations")):
        return {**row, "messages": row["conversations"]}
    return {"messages": [row]} if _are_turns([row]) else row


def _are_turns(turns: Any) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    )


def webdataset(row: RawRow) -> SampleRow:
    """Return a chat of a tar as `samples` does; build a document of the caption of any other row."""
    if "messages" in (chat := samples(row)):
        return chat
    caption = row["txt"] if "txt" in row else row.get("caption") or row.get("text")
    if not isinstance(caption, str) or not caption:
        raise SampleError("no-caption", f"no text in .txt or .json, which have {', '.join(sorted(row))}")
    return row | {"messages": [{"role": "assistant", "content": caption}]}  # `parse_sample` places images


def chat(row: RawRow, id_field: str = "id", image_prefix: str = "", has_images: bool = True) -> SampleRow:
    """Build a conversation of turns `{"from", "value"}`, `{"role", "content"}` or bare strings.

    Bare strings alternate between user and assistant. `<image>` marks the place of an image in a text;
    without such marks, images precede the first text of the user. A column `system` is the first turn.

    Args:
        row: Raw row. `image` or `images` is a path, a list of paths, or absent in text-only rows.
        id_field: Column of the ID.
        image_prefix: Start of the image path; other rows of a published mixture are rejected.
        has_images: Whether `<image>` marks an image, or is text.
    """
    if image_prefix and not str(row.get("image", "")).startswith(image_prefix):
        raise SampleError("other-data-set", f"the image is not below {image_prefix}")
    turns, images = chat_turns(row), row_images(row)
    if any(isinstance(content, list) for _, content in turns):  # parts, which `parse_sample` checks
        messages = [{"role": speaker, "content": content} for speaker, content in turns]
        return {"id": row.get(id_field), "messages": messages, "images": images}
    split = parts if has_images else lambda content: [text(content)]
    return conversation([(speaker, split(content)) for speaker, content in turns], images, row.get(id_field))


def chat_turns(row: RawRow) -> list[tuple[str, Any]]:
    """Return (role, content) of the turns of a chat; content is text or a list of parts.

    Raises:
        SampleError: There are no turns ("raw-schema", "no-answer"), or one is no turn ("role", "text").
    """
    name = next((name for name in TURNS if name in row), TURNS[0])
    turns = [_turn(turn, number) for number, turn in enumerate(list_field(row, name))]
    if not turns:
        raise SampleError("no-answer", "empty conversation")
    system = row.get("system")
    return [("system", system), *turns] if system and turns[0][0] != "system" else turns


def _turn(turn: Any, number: int) -> tuple[str, Any]:
    if isinstance(turn, str):
        return ("assistant" if number % 2 else "user"), turn
    has_role = isinstance(turn, dict) and turn.get("role") is not None  # tables fill up missing keys
    speaker, said = ("role", "content") if has_role else ("from", "value")
    content = field(turn, said)
    if not isinstance(content, str | list):
        raise SampleError("text", f"turn {number} is {type(content).__name__}, not text")
    name = role(field(turn, speaker))
    check_turn(turn, name)
    return name, content


def row_images(row: RawRow) -> list[ImageSource]:
    """Return the images of a row's `image` or `images`.

    Raises:
        SampleError: A value is no image ("image-path"), an item of a list is empty ("image-missing"), both
            columns are filled and differ ("image-count"), or the row has a video or sound ("media").
    """
    _check_media(row)
    filled = [images for name in COLUMNS if (images := images_of(row.get(name)))]
    if len(filled) > 1 and filled[0] != filled[1]:
        raise SampleError("image-count", "image and images differ: fill one of them")
    return filled[0] if filled else []


def _check_media(row: RawRow) -> None:
    if name := next((name for name in _OTHER_MEDIA if row.get(name)), None):
        raise SampleError("media", f"{name} cannot be read, only images")


def images_of(value: Any) -> list[ImageSource]:
    """Return the images of a column, which holds one or a list.

    Raises:
        SampleError: A value is no image ("image-path"), or an item of a list is empty ("image-missing").
    """
    if isinstance(value, list):
        return list(map(image, value))
    source = source_of(value)
    return [] if source is None else [source]


def cauldron_chat(row: RawRow) -> SampleRow:
    """Build one conversation of all questions about the images of a row of The Cauldron."""
    sample = finevision(row)
    if not sample["images"]:
        raise SampleError("image-missing", "the row has no images")
    return sample


def finevision(row: RawRow) -> SampleRow:
    """Build one conversation of a row of FineVision, which may have no images."""
    images = row_images(row)
    pairs = answer_pairs(row)
    is_marked = images and any(IMAGE_PLACEHOLDER in str(question) for question, _ in pairs)
    turns: list[Turn] = []
    for question, answer in pairs:
        asked = parts(question) if is_marked else [text(question)]
        turns += [("user", asked), ("assistant", [text(answer)])]
    return conversation(turns, images, row.get("id"))


def answer_pairs(row: RawRow) -> list[tuple[Any, Any]]:
    """Return (question, answer) of each of a row's `texts`, as in The Cauldron."""
    pairs = [(field(turn, "user"), field(turn, "assistant")) for turn in list_field(row, "texts")]
    if not pairs:
        raise SampleError("no-answer", "the row has no texts")
    return pairs


def captions(row: RawRow) -> SampleRow:
    """Build a document of the image and the caption of a row; see `CAPTION_IMAGES` and `CAPTION_TEXTS`."""
    named = [name for name in CAPTION_IMAGES if name in row]
    if not named:
        raise SampleError("raw-schema", "no field image")
    texts = {name: row[name] for name in CAPTION_TEXTS if row.get(name) not in (None, "")}
    if not texts:
        found = next((name for name in CAPTION_TEXTS if name in row), None)
        raise (
            SampleError("text-empty", f"{found} is empty")
            if found
            else SampleError("raw-schema", "no field text")
        )
    if wrong := next((name for name, value in texts.items() if not isinstance(value, str)), None):
        raise SampleError("raw-schema", f"{wrong} is {type(texts[wrong]).__name__}, not text")
    first, *others = texts.values()
    if any(other != first for other in others):
        raise SampleError(
            "raw-schema", f"{' and '.join(texts)} differ: choose one, such as columns: {{text: caption}}"
        )
    _check_media(row)
    images = next((images for name in named if (images := images_of(row[name]))), None)
    if not images:
        raise SampleError("image-missing", f"{named[0]} is empty")
    return document(first, images, row.get("id"))


def instruction(row: RawRow) -> SampleRow:
    """Build a conversation of a question and its answer; see `QUESTIONS`.

    Also read: `input`, which follows an instruction; `history`, pairs of earlier turns; `system`; `image` or
    `images`. `prompt` and `completion` may be lists of turns.
    """
    found = answer_columns(row)
    if len(found) != 1:
        raise SampleError("raw-schema", "no question and answer" if not found else f"several of {found}")
    if has_options(row) or any(row.get(name) for name in ("choices", "options")):
        raise SampleError("raw-schema", "the row has options, which are not read: set format: questions")
    ((asked, answered),) = found
    if isinstance(row[asked], list):
        return chat({**row, "conversations": row[asked] + list_field(row, answered)})
    if isinstance(row[answered], int | float | list):  # an index, or one of several
        kind = type(row[answered]).__name__
        raise SampleError("raw-schema", f"{answered} is {kind}, not text: set format: questions to read it")
    turns = [("system", parts(row["system"]))] if row.get("system") else []
    for pair in list_field(row, "history") if row.get("history") else ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise SampleError("raw-schema", "history is not a list of pairs of turns")
        turns += [("user", parts(pair[0])), ("assistant", parts(pair[1]))]
    more = parts(row["input"]) if asked == "instruction" and row.get("input") else []
    question = [*parts(row[asked]), *more]
    turns += [("user", _joined(question)), ("assistant", [text(row[answered])])]
    return conversation(turns, row_images(row), row.get("id"))


def has_options(row: RawRow) -> bool:
    """Return whether the row has columns of options by letter."""
    return all(letter in row for letter in _FIRST_OPTIONS)


def answer_columns(row: RawRow) -> list[tuple[str, str]]:
    """Return the pairs of columns of a row that have a question and its answer."""
    return [
        (asked, answered)
        for asked, answers in QUESTIONS.items()
        if row.get(asked) is not None
        for answered in answers
        if row.get(answered) is not None
    ]


def _joined(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join adjacent texts by a line break."""
    joined: list[dict[str, Any]] = []
    for part in content:
        if joined and part["text"] is not None and joined[-1]["text"] is not None:
            joined[-1] = text(f"{joined[-1]['text']}\n{part['text']}")
        else:
            joined.append(part)
    return joined


def plain_text(row: RawRow) -> SampleRow:
    """Build a document of a text."""
    _check_media(row)
    return document(field(row, "text"), id=row.get("id"))
