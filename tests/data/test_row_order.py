"""Order of a source's rows within a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.data.row_order import RowOrder, deal


@dataclass
class Counted:
    """Source of which only the number of rows of each shard matters."""

    rows: list[int]
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, shard: int) -> range:
        self.reads.append(shard)
        return range(self.rows[shard])

    def memory(self, shard: int) -> int:
        return 1


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(2, 20),
    st.integers(0, 120),
    st.integers(0, 120),
)
def test_draws_can_be_undone_without_reading(rows, streams, memory, before, since):
    """Rows of several epochs, from shards that are open, ended or empty."""
    source = Counted(rows)

    def order() -> RowOrder:
        return RowOrder(source, deal(len(rows), streams - 1, streams)[0], "seed", streams - 1, 9, memory)

    whole, drawn = order(), {}
    while not whole.exhausted and whole.drawn < before + since:
        draw, epoch = whole.drawn, whole.epoch
        drawn[draw] = (epoch, *whole.next_key())
    oldest = min(before, whole.drawn)
    state = whole.state(oldest)
    resumed = order()
    source.reads.clear()
    resumed.load_state(*state)
    assert resumed.state(oldest) == state
    places = resumed.places(oldest)
    shards = {draw: resumed.shard_of(place) for draw, place in places.items()}
    assert not source.reads
    found = {
        draw: (place.epoch, shards[draw], resumed.row_of(place, rows[shards[draw]]))
        for draw, place in places.items()
    }
    assert found == {draw: key for draw, key in drawn.items() if draw >= oldest}
    while not whole.exhausted:
        assert not resumed.exhausted
        assert resumed.next_key() == whole.next_key()
    assert resumed.exhausted


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 69))
def test_shards_are_divided_completely_and_evenly(shards, streams, first):
    first %= streams
    shares = [deal(shards, stream, streams, first) for stream in range(streams)]
    pieces = [
        piece for (whole, parts), _ in shares for piece in [*((shard, 0, 1) for shard in whole), *parts]
    ]
    by_shard = {shard: sorted(piece[1:] for piece in pieces if piece[0] == shard) for shard in range(shards)}
    assert all(
        parts == [(part, len(parts)) for part in range(len(parts))] and parts for parts in by_shard.values()
    )
    assert sum(map(len, by_shard.values())) == len(pieces)
    amounts = [len(whole) + sum(1 / parts for *_, parts in shared) for (whole, shared), _ in shares]
    largest_part = max((1 / parts for *_, parts in pieces if parts > 1), default=0)
    assert max(amounts) - min(amounts) <= largest_part + 1e-9
    assert min(amounts) > 0
    ((_, following),) = {(0, following) for _, following in shares}
    longest = [stream for stream, amount in enumerate(amounts) if amount > min(amounts) + 1e-9]
    assert sorted((stream - first) % streams for stream in longest) == list(range(len(longest)))
    if longest:
        assert following == (first + len(longest)) % streams
