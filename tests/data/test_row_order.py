"""Order of a source's rows within a stream."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.data.row_order import deal


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
