"""Elements of JSON arrays, cut at any byte by the chunks of a stream."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.data import json_elements
from solo_vlm.data.json_elements import elements

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def parsed(text: str | bytes, **options) -> list:
    data = text if isinstance(text, bytes) else text.encode()
    found = list(elements(io.BytesIO(data), **options))
    assert all(data[start : start + len(element)] == element for start, element in found)
    return [json.loads(element) for _, element in found]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 0, 2]), is_ascii=st.booleans())
def test_any_array_is_read_at_any_chunk_size(chunk, values, indent, is_ascii):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_elements, "_HEAD", 4)
        patch.setattr(json_elements, "_CHUNK", chunk)
        assert parsed(json.dumps(values, indent=indent, ensure_ascii=is_ascii)) == values


def test_lists_in_an_array_stay_whole():
    assert parsed("[[1, 2], [3], []]") == [[1, 2], [3], []]


def test_byte_order_mark_and_consecutive_values_are_read():
    assert parsed(b'\xef\xbb\xbf [{"a": 1}]') == [{"a": 1}]
    assert parsed('{"a": 1}\n{"b": "ä"}\n') == [{"a": 1}, {"b": "ä"}]
    assert parsed("") == parsed("[]") == parsed(" [\n] ") == []


def test_part_of_an_array_is_read():
    assert parsed('{"a": 1}, [2], 3', is_part=True) == [{"a": 1}, [2], 3]


@pytest.mark.parametrize("text", ['[{"n": 1}, {"n": ', '[{"n": 1}', '[{"n": 1},', '[{"n": 1}] {"n": 2}',
                                  '[{"n": 1}, x]', '[{"n": 1}, {"n": ' + "[" * 3000])  # fmt: skip
def test_elements_before_an_error_are_read(text):
    found = []
    with pytest.raises(ValueError, match=r"not JSON|no end"):
        for _, element in elements(io.BytesIO(text.encode())):
            found.append(json.loads(element))
    assert found == [{"n": 1}]
