"""Converters: one function per raw row format. An entry names its converter and the fields that vary."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from solo_vlm.data.catalog.rows import (
    IMAGE,
    Part,
    RawFolder,
    RawRow,
    SampleRow,
    StoredImage,
    Turn,
    conversation,
    document,
    field,
    image_member,
    list_field,
    role,
    text,
)
from solo_vlm.data.sample import IMAGE_PLACEHOLDER, SampleError
from solo_vlm.utils.errors import SoloError

CLASS_LIST = "mapping.txt"
_REQUEST = "Describe this image in detail."


def caption(row: RawRow, folder: RawFolder, image_field: str, text_field: str) -> SampleRow:
    """Build a document of an image and its text."""
    return document(field(row, text_field), [folder.image(field(row, image_field))], row.get("id"))


def caption_request(
    row: RawRow, folder: RawFolder, image_field: str, text_field: str, id_field: str
) -> SampleRow:
    """Build a conversation: a request to describe the image, then its caption."""
    turns = [("user", [text(_REQUEST)]), ("assistant", [text(field(row, text_field))])]
    image = row.get("image") or field(row, image_field)  # rows with downloaded images have "image" too
    return conversation(turns, [folder.image(image)], row.get(id_field))


def downloaded(row: RawRow, folder: RawFolder, url_field: str, text_field: str) -> SampleRow:
    """Build a document from a downloaded pair, or from a row of the URL list, whose URL is kept."""
    if "columns" in row:
        row = dict(zip((text_field, url_field), list_field(row, "columns"), strict=False))
    if row.get("status", "success") != "success":
        raise SampleError("download-failed", str(row.get("error_message")))
    # img2dataset calls the caption "txt" in tar files and "caption" in parquet files.
    captions = [row[name] for name in ("txt", "caption", text_field) if row.get(name) is not None]
    if not captions:
        raise SampleError("raw-schema", f"no field {text_field}")
    image = image_member(row) or row.get(url_field)
    return document(captions[0], [folder.image(image)], row.get("key"))


def numbered_image(row: RawRow, folder: RawFolder) -> SampleRow:
    """Build a document from `{"img_id", "detailed_caption"}`; the ID is the name of the image file."""
    name = str(field(row, "img_id"))
    path = name if "." in name else f"{name}.jpg"
    return document(field(row, "detailed_caption"), [folder.image(path)], name)


def class_name(row: RawRow, folder: RawFolder) -> SampleRow:
    """Build a document of an image and the name of its class; tar members are called CLASS_NUMBER.jpg."""
    key = str(field(row, "key"))
    class_id = key.split("_")[0]
    names = _class_names(folder.root)
    if class_id not in names:
        raise SampleError("class-unknown", f"{class_id} is not in {CLASS_LIST}")
    return document(names[class_id], [folder.image(image_member(row))], key)


@lru_cache(maxsize=1)
def _class_names(root: Path) -> dict[str, str]:
    """Read lines of a class ID and its comma-separated names, of which the first is used."""
    path = root / CLASS_LIST
    if not path.is_file():
        raise SoloError(
            f"{path} is missing: write lines of a WordNet ID and a name, such as 'n01440764 tench'"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2]
    return {id: name.split(",")[0].replace("_", " ").replace("-", " ") for id, name in pairs}


def chat(row: RawRow, folder: RawFolder, turns_field: str, id_field: str) -> SampleRow:
    """Build a conversation from a list of `{"role", "content"}`."""
    turns: list[Turn] = [
        (role(field(turn, "role")), [text(field(turn, "content"))]) for turn in list_field(row, turns_field)
    ]
    return conversation(turns, id=row.get(id_field))


def instruction(row: RawRow, folder: RawFolder) -> SampleRow:
    """Build a conversation of one question and one answer from `{"instruction", "response", "id", ...}`."""
    turns: list[Turn] = [
        ("user", [text(field(row, "instruction"))]),
        ("assistant", [text(field(row, "response"))]),
    ]
    return conversation(turns, id=row.get("id"))


def slimpajama(row: RawRow, folder: RawFolder) -> SampleRow:
    """Build a document from `{"text", "meta"}`; reject the two web crawls, as the original SOLO code does."""
    if field(field(row, "meta"), "redpajama_set_name") in ("RedPajamaCommonCrawl", "RedPajamaC4"):
        raise SampleError("web-crawl", "the original SOLO code leaves out CommonCrawl and C4")
    return document(field(row, "text"))


def cauldron_chat(row: RawRow, folder: RawFolder) -> SampleRow:
    """Build one conversation of all questions about the images of a row of The Cauldron."""
    turns: list[Turn] = []
    for question, answer in _cauldron_pairs(row):
        turns += [("user", [text(question)]), ("assistant", [text(answer)])]
    return conversation(turns, _cauldron_images(row, folder))


def cauldron_document(row: RawRow, folder: RawFolder) -> SampleRow:
    """Build a document of a row of The Cauldron: each question above its answer."""
    pairs = [f"{text(question)['text']}\n{text(answer)['text']}" for question, answer in _cauldron_pairs(row)]
    return document("\n\n".join(pairs), _cauldron_images(row, folder))


def _cauldron_pairs(row: RawRow) -> list[tuple[str, str]]:
    pairs = [(field(turn, "user"), field(turn, "assistant")) for turn in list_field(row, "texts")]
    if not pairs:
        raise SampleError("no-answer", "the row has no texts")
    return pairs


def _cauldron_images(row: RawRow, folder: RawFolder) -> list[StoredImage]:
    images = [folder.image(image) for image in list_field(row, "images")]
    if not images:
        raise SampleError("image-missing", "the row has no images")
    return images


def llava_chat(row: RawRow, folder: RawFolder, image_prefix: str = "") -> SampleRow:
    """Build a conversation from a LLaVA row `{"id", "image", "conversations": [{"from", "value"}, ...]}`.

    `<image>` marks the place of an image in a turn. Turns may be bare strings, as in the original SOLO data:
    the first is the user's, then they alternate.

    Args:
        row: Raw row. "image" is a path, a list of paths, or absent in text-only rows.
        folder: Folder of the raw data.
        image_prefix: Start of the image path; other rows of a published mixture are rejected.
    """
    if not str(row.get("image", "")).startswith(image_prefix):
        raise SampleError("other-data-set", f"the image is not below {image_prefix}")
    turns = [(speaker, _llava_parts(value)) for speaker, value in _llava_turns(row)]
    return conversation(turns, _llava_images(row, folder), row.get("id"))


def llava_document(row: RawRow, folder: RawFolder, answers_only: bool = False) -> SampleRow:
    """Build a document from a LLaVA row: all turns, or only the answers where questions are mere prompts."""
    if answers_only:
        values = [value for speaker, value in _llava_turns(row) if speaker == "assistant"]
    else:
        values = [value.replace(IMAGE_PLACEHOLDER, "").strip() for _, value in _llava_turns(row)]
    return document("\n".join(values), _llava_images(row, folder), row.get("id"))


def _llava_turns(row: RawRow) -> list[tuple[str, str]]:
    turns = [_llava_turn(turn, number) for number, turn in enumerate(list_field(row, "conversations"))]
    if not turns:
        raise SampleError("no-answer", "empty conversation")
    return turns


def _llava_turn(turn: Any, number: int) -> tuple[str, str]:
    if isinstance(turn, str):
        return ("assistant" if number % 2 else "user"), turn
    value = field(turn, "value")
    if not isinstance(value, str):
        raise SampleError("text", f"turn {number} is {type(value).__name__}, not text")
    return role(field(turn, "from")), value


def _llava_parts(value: str) -> list[Part]:
    parts: list[Part] = []
    for number, piece in enumerate(value.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append(IMAGE)
        if piece.strip():
            parts.append(text(piece))
    if not parts:
        raise SampleError("text-empty", "empty turn")
    return parts


def _llava_images(row: RawRow, folder: RawFolder) -> list[StoredImage]:
    value = row.get("image")
    if value is None:
        return []
    return [folder.image(image) for image in (value if isinstance(value, list) else [value])]
