"""Packer: no item is lost, no pack overflows, packs are well filled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.data.packing import Packer, pack

CAPACITY = 100
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=200)


@given(LENGTHS, st.integers(1, 40))
def test_every_item_is_packed_once_without_overflow(lengths, buffer_size):
    packs = pack(lengths, CAPACITY, buffer_size)
    assert sorted(item for items in packs for item in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in items) <= CAPACITY for items in packs)


@given(LENGTHS, st.integers(1, 40))
def test_oldest_item_is_packed_first_then_best_fit(lengths, buffer_size):
    """The reference is a brute-force search over all waiting items."""
    waiting: list[int] = []
    packs: list[list[int]] = [[]]

    def place() -> None:
        room = CAPACITY - sum(lengths[i] for i in packs[-1])
        fitting = [i for i in waiting if lengths[i] <= room]
        if not fitting:
            packs.append([])
        if waiting[0] in fitting or not fitting:
            chosen = waiting[0]
        else:
            chosen = max(fitting, key=lambda i: (lengths[i], -i))
        waiting.remove(chosen)
        packs[-1].append(chosen)

    for item in range(len(lengths)):
        waiting.append(item)
        if len(waiting) > buffer_size:
            place()
    while waiting:
        place()
    assert pack(lengths, CAPACITY, buffer_size) == [items for items in packs if items]


def test_short_items_are_not_delayed():
    """The first packs contain items of all lengths in proportion, with any buffer."""
    lengths = np.random.default_rng(0).integers(8, 14, 2_000)
    first = [item for items in pack(lengths.tolist(), CAPACITY, buffer_size=128)[:20] for item in items]
    assert max(abs(place - item) for place, item in enumerate(first)) < 32
    assert abs(lengths[first].mean() - lengths.mean()) < 0.3  # three standard errors of some 200 items


@given(LENGTHS, st.data())
def test_restored_packer_continues_identically(lengths, data):
    cut = data.draw(st.integers(0, len(lengths)))
    whole = Packer(CAPACITY, 8)
    for item, length in enumerate(lengths[:cut]):
        whole.add(item, length)
    restored = Packer(CAPACITY, 8)
    restored.restore(*([(item, lengths[item]) for item in items] for items in (whole.open, whole.waiting)))
    for item, length in enumerate(lengths[cut:], start=cut):
        assert whole.add(item, length) == restored.add(item, length)
    assert list(iter(whole.drain, None)) == list(iter(restored.drain, None))


@pytest.mark.parametrize("length", [0, CAPACITY + 1])
def test_item_of_invalid_length_is_rejected(length):
    with pytest.raises(ValueError, match=f"{length} tokens"):
        pack([length], CAPACITY)


def test_realistic_sequences_are_full():
    """Documents are captions of photographs and web texts, at the paper's length with the default buffer."""
    rng = np.random.default_rng(0)
    captions, texts = rng.integers(150, 350, 20_000), rng.geometric(1 / 1200, 3_000).clip(1, 32_768)
    lengths = rng.permutation(np.concatenate([captions, texts])).tolist()
    packs = pack(lengths, 32_768, buffer_size=128)
    fill = [sum(lengths[i] for i in items) / 32_768 for items in packs]
    assert np.mean(fill[:-4]) >= 0.997  # the last packs contain the remainder
