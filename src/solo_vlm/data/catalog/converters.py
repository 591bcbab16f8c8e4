"""Converters of single data sets of the paper; `formats.converters` has those of formats that others use."""

from __future__ import annotations

from collections.abc import Mapping

from solo_vlm.data.formats.converters import answer_pairs, chat_turns, row_images
from solo_vlm.data.formats.rows import (
    RawRow,
    SampleRow,
    conversation,
    document,
    field,
    image,
    image_member,
    list_field,
    text,
)
from solo_vlm.data.sample import IMAGE_PLACEHOLDER, SampleError

_REQUEST = "Describe this image in detail."


def caption_request(row: RawRow, image_field: str, text_field: str, id_field: str) -> SampleRow:
    """Build a conversation: a request to describe the image, then its caption."""
    turns = [("user", [text(_REQUEST)]), ("assistant", [text(field(row, text_field))])]
    picture = row.get("image") or field(row, image_field)  # rows with downloaded images have "image" too
    return conversation(turns, [image(picture)], row.get(id_field))


def downloaded(row: RawRow, url_field: str, text_field: str) -> SampleRow:
    """Build a document from a downloaded pair, or from a row of the URL list, whose URL is kept."""
    if "columns" in row:
        row = dict(zip((text_field, url_field), list_field(row, "columns"), strict=False))
    if row.get("status", "success") != "success":
        raise SampleError("download-failed", str(row.get("error_message")))
    # img2dataset calls the caption "txt" in tar files and "caption" in parquet files.
    captions = [row[name] for name in ("txt", "caption", text_field) if row.get(name) is not None]
    if not captions:
        raise SampleError("raw-schema", f"no field {text_field}")
    return document(captions[0], [image(image_member(row) or row.get(url_field))], row.get("key"))


def numbered_image(row: RawRow) -> SampleRow:
    """Build a document from `{"img_id", "detailed_caption"}`; the ID is the name of the image file."""
    name = str(field(row, "img_id"))
    path = name if "." in name else f"{name}.jpg"
    return document(field(row, "detailed_caption"), [image(path)], name)


def class_name(row: RawRow, names: Mapping[str, str]) -> SampleRow:
    """Build a document of an image and the name of its class; tar members are called CLASS_NUMBER.jpg."""
    key = str(field(row, "key"))
    class_id = key.split("_")[0]
    if class_id not in names:
        raise SampleError("class-unknown", f"{class_id} is not in the list of classes")
    return document(names[class_id], [image(image_member(row))], key)


def labeled_image(row: RawRow) -> SampleRow:
    """Build a document from `{"image", "label"}`; the label is the name of a class."""
    return document(field(row, "label"), [image(field(row, "image"))])


def slimpajama(row: RawRow) -> SampleRow:
    """Build a document from `{"text", "meta"}`; reject the two web crawls, as the original SOLO code does."""
    if field(field(row, "meta"), "redpajama_set_name") in ("RedPajamaCommonCrawl", "RedPajamaC4"):
        raise SampleError("web-crawl", "the original SOLO code leaves out CommonCrawl and C4")
    return document(field(row, "text"))


def cauldron_document(row: RawRow) -> SampleRow:
    """Build a document of a row of The Cauldron: each question above its answer."""
    pairs = [f"{text(question)['text']}\n{text(answer)['text']}" for question, answer in answer_pairs(row)]
    return document("\n\n".join(pairs), map(image, list_field(row, "images")))


def llava_document(row: RawRow, answers_only: bool = False) -> SampleRow:
    """Build a document from a LLaVA row: all turns, or only the answers where questions are mere prompts."""
    turns = chat_turns(row)
    if answers_only:
        values = [value for speaker, value in turns if speaker == "assistant"]
    else:
        values = [value.replace(IMAGE_PLACEHOLDER, "").strip() for _, value in turns]
    return document("\n".join(values), row_images(row), row.get("id"))
