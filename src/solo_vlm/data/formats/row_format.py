"""Row formats by name, their recognition from the first rows, and how a source reads its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from solo_vlm.data.formats import converters, questions
from solo_vlm.data.formats.converters import CAPTION_IMAGES, CAPTION_TEXTS, QUESTIONS, TURNS
from solo_vlm.data.formats.row_filter import RowFilter
from solo_vlm.data.formats.rows import RawRow, SampleRow
from solo_vlm.data.sample import IMAGE_PLACEHOLDER, FilteredRow, SampleError
from solo_vlm.data.values import COLUMNS, looks_like_image, printable
from solo_vlm.utils.errors import SoloError, did_you_mean

FormatName = Literal[
    "samples",
    "webdataset",
    "sharegpt",
    "llava",
    "chatml",
    "finevision",
    "cauldron",
    "instruction",
    "questions",
    "captions",
    "text",
]

_NEAR = 3  # formats described in a message
_USUAL: tuple[FormatName, ...] = ("captions", "llava")  # described where none is near
_SAMPLE_ROLES = frozenset({"system", "user", "assistant"})
_CHAT = (*TURNS, *COLUMNS, "system", "id")


class _Format(NamedTuple):
    """Format of raw rows.

    Attributes:
        convert: Function from a raw row to a sample row.
        matches: Function that recognizes a raw row.
        reads: Columns that are read, where a row has them.
        expects: Description of a row.
    """

    convert: Callable[[Any], SampleRow]
    matches: Callable[[RawRow], bool]
    reads: Sequence[str]
    expects: str


def _turns(row: RawRow, *keys: str) -> bool:
    """Return whether the row has turns with these keys; bare strings are turns, too."""
    found = next((row[name] for name in TURNS if name in row), None)
    if not isinstance(found, list) or not found:
        return False
    return all(isinstance(turn, str) or (isinstance(turn, dict) and turn.keys() >= {*keys}) for turn in found)


def _is_sample(row: RawRow) -> bool:
    messages = converters.samples(row).get("messages", ())
    if not isinstance(messages, list) or not messages:
        return "messages" in row
    return all(isinstance(turn, dict) and str(turn.get("role")) in _SAMPLE_ROLES for turn in messages)


def _has_image(row: RawRow) -> bool:
    turns = [row.get(name) for name in TURNS]
    return any(row.get(name) is not None for name in COLUMNS) or IMAGE_PLACEHOLDER in str(turns)


def _has_texts(row: RawRow) -> bool:
    texts = row.get("texts")
    return isinstance(texts, list) and all(isinstance(t, dict) and "user" in t for t in texts)


def _is_rated(row: RawRow) -> bool:
    return any(name.endswith(("_min", "_ratings")) for name in row)


def _is_caption(row: RawRow) -> bool:
    others = ("texts", *TURNS)
    return (
        any(name in row for name in CAPTION_IMAGES)
        and any(isinstance(row.get(name), str | int | float) for name in CAPTION_TEXTS)
        and not any(name in row for name in others)
    )


def _is_text(row: RawRow) -> bool:
    return isinstance(row.get("text"), str) and not any(
        name in CAPTION_IMAGES or looks_like_image(value) for name, value in row.items() if name != "text"
    )


_ALL_QUESTIONS = tuple(dict.fromkeys(name for asked in QUESTIONS.items() for name in (asked[0], *asked[1])))
_FROM_VALUE = '[{"from": "human" or "gpt", "value": text}, ...]'

FORMATS: dict[FormatName, _Format] = {
    "samples": _Format(
        converters.samples,
        _is_sample,
        ("messages", *COLUMNS, "id"),
        'messages [{"role": "user" or "assistant", "content": text or parts}, ...], image or images',
    ),
    "webdataset": _Format(
        converters.webdataset,
        lambda row: _is_sample(row) or any(isinstance(row.get(name), str) for name in CAPTION_TEXTS),
        ("messages", *COLUMNS, "txt", "caption", "text", "id"),
        "members of one name: an image, and .txt, or .json with caption or messages",
    ),
    "sharegpt": _Format(
        converters.chat,
        lambda row: _turns(row, "from", "value") and not _has_image(row),
        _CHAT,
        f"conversations {_FROM_VALUE}, image or images if there are any",
    ),
    "llava": _Format(
        converters.chat,
        lambda row: _turns(row, "from", "value"),
        _CHAT,
        f"conversations {_FROM_VALUE} with <image> at the place of an image, image (a path or a list)",
    ),
    "chatml": _Format(
        converters.chat,
        lambda row: _turns(row, "role", "content"),
        _CHAT,
        'messages or conversations [{"role": name, "content": text or parts}, ...], image or images',
    ),
    "finevision": _Format(
        converters.finevision,
        lambda row: _has_texts(row) and _is_rated(row),
        ("texts", *COLUMNS, "id"),
        'images, texts [{"user": text, "assistant": text}, ...]',
    ),
    "cauldron": _Format(
        converters.cauldron_chat,
        lambda row: _has_texts(row) and not _is_rated(row),
        ("texts", *COLUMNS, "id"),
        'images, texts [{"user": text, "assistant": text}, ...]',
    ),
    "instruction": _Format(
        converters.instruction,
        lambda row: len(converters.answer_columns(row)) == 1 and not questions.is_question(row),
        (*_ALL_QUESTIONS, "input", "history", *COLUMNS, "system", "id"),
        "one of instruction, query, question or prompt, its output, response, answer or completion, image or "
        "images if there are any",
    ),
    "questions": _Format(
        questions.questions,
        questions.is_question,  # others may be of `instruction`, too
        (*questions.READS, *questions.CATEGORIES, *ascii_uppercase),
        "question, answer (a text, a number or a list of accepted ones), image, images or image_path, "
        "options (a list, or columns A, B, ...), hint and metric if there are any",
    ),
    "captions": _Format(
        converters.captions,
        _is_caption,
        (*CAPTION_IMAGES, *CAPTION_TEXTS, "id"),
        "image (also images, image_path, file_name, image_url), text or caption",
    ),
    "text": _Format(converters.plain_text, _is_text, ("text", "id"), "text, and no image"),
}

KNOWN_COLUMNS = frozenset(name for known in FORMATS.values() for name in known.reads) - {"id"}
"""Columns that some format reads."""


@dataclass(frozen=True)
class RowFormat:
    """Conversion of the raw rows of a source to sample rows.

    Attributes:
        name: Format of the rows.
        columns: Columns of the rows, by the names that the format reads.
        filter: Rows to keep; default: all.
    """

    name: FormatName = "samples"
    columns: Mapping[str, str] = field(default_factory=dict)
    filter: RowFilter | None = None

    def __call__(self, row: Any) -> SampleRow:
        """Convert a raw row to a sample row.

        Raises:
            FilteredRow: The filter leaves the row out.
            SampleError: The row is not of the format.
        """
        row = _renamed(row, self.columns)
        if self.filter is not None and not (isinstance(row, dict) and self.filter(row)):
            raise FilteredRow(self.filter.expression)
        if self.name == "samples":  # `parse_sample` checks all that follows
            return converters.samples(row)
        if not isinstance(row, dict):
            raise SampleError("json", "not an object")
        sample = FORMATS[self.name].convert(row)
        if not any(sample.get(name) for name in COLUMNS):
            _check_for_lost_image(row, FORMATS[self.name].reads)
        return sample

    def unread(self, columns: Iterable[str]) -> list[str]:
        """Return the columns of rows that neither the format nor the filter reads."""
        read = {*FORMATS[self.name].reads, *self.columns.values()}
        return sorted({*columns} - read - (self.filter.columns if self.filter else frozenset()))

    def __str__(self) -> str:
        settings = [f"columns {dict(self.columns)}"] if self.columns else []
        settings += [f"filter {self.filter.expression!r}"] if self.filter else []
        return ", ".join([self.name, *settings])


def _renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """Return the row with columns named as the format names them."""
    if not columns or not isinstance(row, dict):
        return row
    others = {name: value for name, value in row.items() if name not in columns}
    return others | {name: row[column] for name, column in columns.items() if column in row}


def _check_for_lost_image(row: RawRow, reads: Sequence[str]) -> None:
    for name, value in row.items():
        if name not in reads and looks_like_image(value):
            raise SampleError(
                "image-column", f"{name} looks like an image; columns: {{image: {name}}} reads it as one"
            )


def columns_of(rows: Sequence[Any]) -> list[str]:
    """Return the columns of raw rows in order of appearance."""
    return list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))


def choose_format(
    where: str,
    rows: Sequence[Any],
    name: FormatName | Literal["auto"],
    columns: Mapping[str, str],
    filter: str | None,
    own: FormatName = "samples",
) -> RowFormat:
    """Return the format of a source's rows, recognized from the first ones for "auto".

    Args:
        where: Source, for messages.
        rows: First readable raw rows.
        name: Name of the format, or "auto".
        columns: Columns of the rows, by the names that the format reads.
        filter: Expression for the rows to keep.
        own: Format of the kind of file, which goes before others.

    Raises:
        SoloError: The columns or the filter do not fit the rows, no or several formats do, or no row is of
            the named format.
    """
    found = columns_of(rows)
    _check_columns(where, found, name, columns)
    row_filter = RowFilter(filter) if filter is not None else None
    if row_filter and rows and (missing := sorted(row_filter.columns - {*found, *columns})):
        hint = did_you_mean(missing[0], found)
        raise SoloError(f"{where}: filter names {missing[0]}, but {_listed(found)}{hint}")
    renamed = [_renamed(row, columns) for row in rows]
    if name == "auto":
        name = _recognize(where, renamed, found, own)
    row_format = RowFormat(name, columns, row_filter)
    _check_rows(where, row_format, rows, found)
    return row_format


def _check_columns(where: str, found: Sequence[str], name: str, columns: Mapping[str, str]) -> None:
    formats = [FORMATS[name]] if name in FORMATS else FORMATS.values()  # type: ignore[index]
    known = list(dict.fromkeys(column for known in formats for column in known.reads))
    for column, source in columns.items():
        if column not in known:
            raise SoloError(
                f"{where}: columns names {column}, but {name} reads {', '.join(known)}"
                f"{did_you_mean(column, known)}"
            )
        if found and source not in found:
            raise SoloError(
                f"{where}: columns reads {column} from {source}, but {_listed(found)}"
                f"{did_you_mean(source, found)}"
            )


def _recognize(where: str, rows: Sequence[Any], found: Sequence[str], own: FormatName) -> FormatName:
    if any(isinstance(row, list) for row in rows):  # a list of turns
        return own
    rows = [row for row in rows if isinstance(row, dict)]
    if not rows or any(map(FORMATS[own].matches, rows)):
        return own
    named_only = ("samples", "webdataset")
    others = {name: kind for name, kind in FORMATS.items() if name not in named_only}
    matching = {name: sum(map(kind.matches, rows)) for name, kind in others.items()}
    near = [name for name, count in matching.items() if count and count == max(matching.values())]
    if not near:
        named = {*found} - {"id", "index", *questions.CATEGORIES}
        shared = {name: len({*kind.reads} & named) for name, kind in others.items()}
        near = [name for name, count in shared.items() if count and count == max(shared.values())]
        listed = near or list(others)
        described = near or list(_USUAL)
        if len(near) > _NEAR:
            described = [name for name in _USUAL if name in near] or near[:_NEAR]
        more = ", ".join(name for name in listed if name not in described)
        expected = f"but {_expected(described)}{f', and there are {more}' if more else ''}"
        raise SoloError(f"{where}: unknown rows; {_listed(found)}, {expected}: set format and columns")
    if len({FORMATS[name].convert for name in near}) > 1:
        raise SoloError(
            f"{where}: rows may be {' or '.join(near)}; {_listed(found)}, and {_expected(near)}: set format"
        )
    return near[0]


def _check_rows(where: str, row_format: RowFormat, rows: Sequence[Any], found: Sequence[str]) -> None:
    """Raise SoloError if no row is of the format; other errors of single rows are found while training."""
    errors = []
    for row in rows:
        try:
            row_format(row)
        except FilteredRow:
            continue
        except SampleError as error:
            errors.append(error)
    if rows and len(errors) == len(rows) and {error.reason for error in errors} <= {"raw-schema", "filter"}:
        raise SoloError(f"{where}: {errors[0]}; {_listed(found)}, but {_expected([row_format.name])}")


def _listed(found: Sequence[str]) -> str:
    return f"rows have {printable(', '.join(map(str, found))) or 'no columns'}"


def _expected(names: Sequence[FormatName]) -> str:
    return "; ".join(f"{name} has {FORMATS[name].expects}" for name in names)
