"""Groups of documents in a packed row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.models.packed.groups import document_groups, split_documents

LENGTHS = st.lists(st.integers(1, 40) | st.integers(250, 300), min_size=1, max_size=12)


@pytest.mark.parametrize("pad", [True, False])
@given(LENGTHS)
def test_each_token_is_in_one_group_beside_its_document(pad, lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    seen = []
    for index, valid in document_groups(bounds, pad):
        assert (valid.sum(1) * 2 > index.shape[1]).all() if pad else valid.all()
        for document, is_token in zip(index, valid, strict=True):
            tokens = document[is_token]
            assert tokens[0] in bounds and tokens[-1] + 1 in bounds and (tokens.diff() == 1).all()
            seen.append(tokens)
    assert torch.cat(seen).sort().values.equal(torch.arange(sum(lengths)))


@given(LENGTHS, st.integers(1, 20))
def test_chunks_restart_with_each_document(lengths, size):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    expected = [
        start + offset for start, n in zip(bounds, lengths, strict=False) for offset in range(0, n, size)
    ]
    assert split_documents(bounds, size).tolist() == [*expected, sum(lengths)]
