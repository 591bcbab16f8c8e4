"""Text without images: documents, chats, and instructions with their responses."""

from __future__ import annotations

from solo_vlm.data.catalog.entry import Convert, RawRow, SampleRow
from solo_vlm.data.catalog.raw_folder import RawFolder
from solo_vlm.data.catalog.rows import Turn, conversation, document, field, list_field, role, text
from solo_vlm.data.sample import SampleError


def chat(field_name: str, id_field: str) -> Convert:
    """Chats as lists of `{"role", "content"}`; data sets only differ in the names of two fields."""

    def convert(row: RawRow, folder: RawFolder) -> SampleRow:
        turns: list[Turn] = [
            (role(field(turn, "role")), [text(field(turn, "content"))])
            for turn in list_field(row, field_name)
        ]
        return conversation(turns, id=row.get(id_field))

    return convert


def instruction(row: RawRow, folder: RawFolder) -> SampleRow:
    """`{"instruction", "response", "id", ...}`: one question, one answer."""
    turns: list[Turn] = [
        ("user", [text(field(row, "instruction"))]),
        ("assistant", [text(field(row, "response"))]),
    ]
    return conversation(turns, id=row.get("id"))


def slimpajama(row: RawRow, folder: RawFolder) -> SampleRow:
    """`{"text", "meta": {"redpajama_set_name"}}`, without the two web crawls, which the release left out."""
    if field(field(row, "meta"), "redpajama_set_name") in ("RedPajamaCommonCrawl", "RedPajamaC4"):
        raise SampleError("web-crawl", "the release left out CommonCrawl and C4")
    return document(field(row, "text"))
