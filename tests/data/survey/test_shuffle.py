"""Quality of the shuffle: shards per sequence, relative to a perfect shuffle."""

from __future__ import annotations

import pytest

from solo_vlm.data.survey.shuffle import shuffle_quality


class Shards:
    """Source of shards of one size in memory."""

    name = "shards"

    def __init__(self, count: int, memory: int) -> None:
        self._count, self._memory = count, memory

    def __len__(self) -> int:
        return self._count

    def memory(self, shard: int) -> int:
        return self._memory


@pytest.mark.parametrize(
    ("count", "memory", "streams", "expected"),
    [
        (1, 2**22, 64, 1.0),  # one shard, which all streams divide
        (64, 2**22, 1, 0.35),  # 16 row groups of 4 MB are open
        (1024, 2**21, 64, 0.17),  # each stream has 16 tars, and draws from all of them
        (1024, 2**28, 64, 0.02),  # two row groups of 256 MB at a time
    ],
)
def test_share_of_the_shards_of_a_perfect_shuffle(count, memory, streams, expected):
    rows = dict.fromkeys(range(0, count, 3), 1000)
    quality = shuffle_quality(Shards(count, memory), rows, 100, streams)
    assert quality == pytest.approx(expected, rel=0.15)
