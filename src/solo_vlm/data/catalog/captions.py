"""An image and one text about it, in one field each."""

from __future__ import annotations

from typing import Any

from solo_vlm.data.catalog.entry import Convert, RawRow, SampleRow
from solo_vlm.data.catalog.raw_folder import RawFolder
from solo_vlm.data.catalog.rows import conversation, document, field, image_member, list_field, text
from solo_vlm.data.sample import SampleError

_REQUEST = "Describe this image in detail."


def caption(image_field: str, text_field: str) -> Convert:
    """A document: the image, then its text."""

    def convert(row: RawRow, folder: RawFolder) -> SampleRow:
        return document(field(row, text_field), [folder.image(field(row, image_field))], row.get("id"))

    return convert


def answered_request(image_field: str, text_field: str, id_field: str) -> Convert:
    """A conversation: a request to describe the image, then its text."""

    def convert(row: RawRow, folder: RawFolder) -> SampleRow:
        turns = [("user", [text(_REQUEST)]), ("assistant", [text(field(row, text_field))])]
        image = row.get("image") or field(row, image_field)  # the same rows, with images downloaded
        return conversation(turns, [folder.image(image)], row.get(id_field))

    return convert


def downloaded(url_field: str, text_field: str) -> Convert:
    """What a downloader made of a list of URLs, or a row of the list itself, whose URL then stays one."""

    def convert(row: RawRow, folder: RawFolder) -> SampleRow:
        if "columns" in row:
            row = dict(zip((text_field, url_field), list_field(row, "columns"), strict=False))
        if row.get("status", "success") != "success":
            raise SampleError("download-failed", str(row.get("error_message")))
        image = image_member(row) or row.get(url_field)
        return document(_caption(row, text_field), [folder.image(image)], row.get("key"))

    return convert


def _caption(row: RawRow, text_field: str) -> Any:
    """The text beside a downloaded image is `txt` in tar files and `caption` in parquet files."""
    for name in ("txt", "caption", text_field):
        if row.get(name) is not None:
            return row[name]
    raise SampleError("raw-schema", f"no field {text_field}")


def numbered_image(row: RawRow, folder: RawFolder) -> SampleRow:
    """`{"img_id", "detailed_caption"}`; the image's file is named by the id."""
    name = str(field(row, "img_id"))
    path = name if "." in name else f"{name}.jpg"
    return document(field(row, "detailed_caption"), [folder.image(path)], name)
