"""Elements of JSON arrays too large for memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

_HEAD = 1 << 10  # bytes read first, which contain the bracket of an array
_CHUNK = 1 << 20
_MAX_LENGTH = 1 << 28
_BRACKETS_AND_STRINGS = re.compile(r'[\[\]{}]|"(?:[^"\\]|\\.)*"', re.DOTALL)
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_DELIMITERS = (" ", "\t", "\r", "\n", ",", "]")
_START = re.compile(r"(?:\xef\xbb\xbf)?[ \t\r\n]*\[?")  # byte order mark, bracket of the array


def elements(stream: BinaryIO, is_part: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield position and bytes of the elements of one array, or of consecutive values.

    Args:
        stream: Whole file, or some elements of one.
        is_part: Whether the stream starts after the array's bracket, and may lack its end.

    Raises:
        ValueError: The rest is not JSON, or truncated. Elements before it have been yielded.
    """
    # Latin-1 maps bytes to characters one by one; the characters that structure JSON are ASCII, and no other
    # character of UTF-8 contains them.
    decoder = json.JSONDecoder()
    buffer, offset, chunk = stream.read(_HEAD).decode("latin-1"), 0, _CHUNK
    start = 0 if is_part else _START.match(buffer).end()  # type: ignore[union-attr]
    is_array = buffer[:start].endswith("[")
    is_end = False
    while True:
        start = _BETWEEN.match(buffer, start).end()  # type: ignore[union-attr]
        while (end := _end(decoder, buffer, start, is_end)) is not None:
            yield offset + start, buffer[start:end].encode("latin-1")
            start = _BETWEEN.match(buffer, end).end()  # type: ignore[union-attr]
        # Doubling the chunk for a value longer than the buffer keeps the number of retries logarithmic.
        chunk = _CHUNK if start else chunk * 2
        buffer, offset, start = buffer[start:], offset + start, 0
        if is_end or len(buffer) > _MAX_LENGTH:
            break
        more = stream.read(chunk)
        is_end = not more
        buffer += more.decode("latin-1")
    if is_array and buffer.startswith("]"):
        is_array, buffer = False, buffer[1:]
    if buffer.strip():
        text = buffer.strip()[:80].encode("latin-1").decode(errors="replace")
        raise ValueError(f"not JSON, or truncated, at byte {offset}: {text!r}")
    if is_array and not is_part:
        raise ValueError("the array has no end: the file is truncated")


def _end(decoder: json.JSONDecoder, buffer: str, start: int, is_end: bool) -> int | None:
    """Return the end of a value; None if it is not in the buffer, or not JSON."""
    try:
        end = decoder.raw_decode(buffer, start)[1]
    except json.JSONDecodeError:
        return None
    except RecursionError:
        return _end_of_brackets(buffer, start)
    # A number may go on in the next chunk.
    is_whole = buffer[start] in '{["' or buffer[end : end + 1] in _DELIMITERS
    return end if is_whole or (is_end and end == len(buffer)) else None


def _end_of_brackets(buffer: str, start: int) -> int | None:
    """Return the end of an object or array of any depth; None if it is not in the buffer."""
    depth = 0
    for token in _BRACKETS_AND_STRINGS.finditer(buffer, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if not depth:
            return token.end()
    return None
