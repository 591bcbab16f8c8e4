"""Objects of a JSON file one at a time: published arrays hold gigabytes, which need not be in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from solo_vlm.data.sample import SampleError

_CHUNK = 1 << 20
_LONGEST = 1 << 28
_BRACKETS_AND_STRINGS = re.compile(r'[\[\]{}]|"(?:[^"\\]|\\.)*"', re.DOTALL)
_BETWEEN = " \t\r\n,[]"


def json_values(stream: TextIO) -> Iterator[dict[str, Any] | SampleError]:
    """The objects of one array, or one after the other. What cannot be parsed ends the file as an error."""
    decoder = json.JSONDecoder()
    buffer, chunk = "", _CHUNK
    while more := stream.read(chunk):
        buffer, start = buffer + more, 0
        while True:
            start = _skip(buffer, start)
            try:
                value, end = decoder.raw_decode(buffer, start)
            except json.JSONDecodeError:
                break
            except RecursionError:
                if (after := _end_of_value(buffer, start)) is None:
                    break
                yield SampleError("json", "too deeply nested")
                start = after
                continue
            yield json_object(value, buffer[start:end])
            start = end
        # A value longer than the buffer is tried again with twice as much, so that it is not read n times.
        chunk = _CHUNK if start else chunk * 2
        buffer = buffer[start:]
        if len(buffer) > _LONGEST:
            break
    if buffer.strip(_BETWEEN):
        yield SampleError("file-broken", f"not JSON, or cut off, at: {buffer.strip(_BETWEEN)[:80]!r}")


def json_object(value: Any, source: str) -> dict[str, Any] | SampleError:
    """A parsed value, if it is an object whose strings can be stored.

    Args:
        value: what `json` made of the source.
        source: the text it was parsed from. Half a surrogate pair can only come from an escape in it.
    """
    if not isinstance(value, dict):
        return SampleError("raw-schema", "not a JSON object")
    if "\\ud" in source.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return SampleError("json", str(error))
    return value


def _end_of_value(buffer: str, start: int) -> int | None:
    """Where an object or array ends, whatever it holds; None where the buffer has no end of it."""
    depth = 0
    for token in _BRACKETS_AND_STRINGS.finditer(buffer, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if not depth:
            return token.end()
    return None


def _skip(buffer: str, start: int) -> int:
    while start < len(buffer) and buffer[start] in _BETWEEN:
        start += 1
    return start
