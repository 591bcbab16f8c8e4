"""A cache with room holds what transformers' own holds, whatever is done to it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from solo_vlm.generate.cache import preallocated_cache

LAYERS = 2
STEPS = st.lists(
    st.one_of(
        st.integers(1, 300).map(lambda tokens: ("append", tokens)),
        st.integers(1, 5).map(lambda tokens: ("crop", tokens)),
        st.permutations(range(3)).map(lambda rows: ("reorder", rows)),
    ),
    max_size=12,
)


@given(STEPS)
@settings(deadline=None, max_examples=50)
def test_it_holds_what_a_dynamic_cache_holds(steps):
    expected, ours = DynamicCache(), preallocated_cache()
    for kind, what in [("append", 7), *steps]:
        for index in range(LAYERS):
            if kind == "append":
                keys, values = torch.rand(3, 2, what, 4), torch.rand(3, 2, what, 6)
                for one, other in zip(
                    ours.update(keys, values, index), expected.update(keys, values, index), strict=True
                ):
                    assert torch.equal(one, other)
        for cache in (ours, expected):
            if kind == "crop" and expected.get_seq_length() > what:
                cache.crop(-what)
            elif kind == "reorder":
                cache.reorder_cache(torch.tensor(what))
        assert ours.get_seq_length() == expected.get_seq_length()
    for one, other in zip(ours.layers, expected.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_a_token_is_written_beside_those_before_it():
    cache = preallocated_cache()
    keys, _ = cache.update(torch.rand(1, 2, 1000, 4), torch.rand(1, 2, 1000, 4), 0)
    places = {
        cache.update(torch.rand(1, 2, 1, 4), torch.rand(1, 2, 1, 4), 0)[0].data_ptr() for _ in range(200)
    }
    assert places == {keys.data_ptr()}
