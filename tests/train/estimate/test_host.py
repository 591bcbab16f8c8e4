"""Main memory of the plan, against the objects that it counts."""

from __future__ import annotations

import numpy as np
from tests.train.estimate.test_plan import ALONE, CONFIG, recipe

from solo_vlm.data.encode import Draft
from solo_vlm.data.row_order import OPEN_BYTES
from solo_vlm.train.estimate.host import host_memory
from solo_vlm.train.estimate.layout import Layout

LAYOUT = Layout.of(CONFIG, recipe(), ALONE)


def test_packers_hold_the_bytes_of_drafts():
    settings = recipe("data.streams=64", "data.packing_buffer=16")
    draft = Draft(np.zeros(100, np.int32), np.zeros(100, bool))
    held = 64 * 16 * (draft.input_ids.nbytes + draft.supervised.nbytes)
    assert host_memory(LAYOUT, settings, 0.0, 100).packers == held


def test_open_shards_are_bounded_by_streams_and_by_the_data():
    settings = recipe("data.streams=64")
    assert host_memory(LAYOUT, settings).shards == 64 * OPEN_BYTES
    assert host_memory(LAYOUT, recipe("data.streams=512")).shards == 64 * OPEN_BYTES
    small = host_memory(LAYOUT, settings, 0.0, 100, tokens=1000)
    assert small.shards == 1000 * 5
