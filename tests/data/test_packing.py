"""The packer: nothing lost, nothing too long, well filled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.data.packing import Packer, pack

CAPACITY = 100
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=200)


@given(LENGTHS, st.integers(1, 40))
def test_every_item_is_packed_once_and_no_pack_overflows(lengths, buffer_size):
    packs = pack(lengths, CAPACITY, buffer_size)
    assert sorted(item for items in packs for item in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in items) <= CAPACITY for items in packs)


@given(LENGTHS, st.integers(1, 40))
def test_the_oldest_goes_first_and_the_longest_that_fits_takes_the_rest(lengths, buffer_size):
    """Against a brute force that looks at every waiting item every time."""
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


def test_short_items_do_not_wait_for_long_ones():
    """The first packs hold items of all lengths in their shares, whatever the buffer."""
    lengths = np.random.default_rng(0).integers(8, 14, 2_000)
    first = [item for items in pack(lengths.tolist(), CAPACITY, buffer_size=128)[:20] for item in items]
    assert max(abs(place - item) for place, item in enumerate(first)) < 32
    assert abs(lengths[first].mean() - lengths.mean()) < 0.3  # three standard errors of some 200 items


@given(LENGTHS, st.data())
def test_a_restored_packer_goes_on_alike(lengths, data):
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
def test_what_cannot_be_packed_is_refused(length):
    with pytest.raises(ValueError, match=f"{length} tokens"):
        pack([length], CAPACITY)


def test_sequences_are_full():
    """Captions of photographs and web texts at the paper's length; 128 documents to choose from."""
    rng = np.random.default_rng(0)
    captions, texts = rng.integers(150, 350, 20_000), rng.geometric(1 / 1200, 3_000).clip(1, 32_768)
    lengths = rng.permutation(np.concatenate([captions, texts])).tolist()
    packs = pack(lengths, 32_768, buffer_size=128)
    fill = [sum(lengths[i] for i in items) / 32_768 for items in packs]
    assert np.mean(fill[:-4]) >= 0.997  # the last ones are what was left
