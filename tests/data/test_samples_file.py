"""Row groups stay small enough to be held open by the hundred, whatever is in them."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from solo_vlm.data.samples_file import write_samples


@pytest.mark.parametrize(
    ("size", "rows"), [(100, [256, 256, 88]), (100_000, [40] * 15), (5_000_000, [1] * 8)]
)
def test_row_groups_are_bounded_in_rows_and_bytes(tmp_path, size, rows):
    count = sum(rows)
    text = [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    samples = [
        {"id": str(number), "messages": text, "images": [{"bytes": bytes(size), "path": None}]}
        for number in range(count)
    ]
    assert write_samples(tmp_path / "a.parquet", iter(samples)) == count
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == rows
    assert file.read(columns=["id"])["id"].to_pylist() == [str(number) for number in range(count)]
