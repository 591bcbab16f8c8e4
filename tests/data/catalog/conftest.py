"""Raw folders with the files that rows refer to."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data.catalog.catalog_rows import FILES, JPEG


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)
    (folder / "mapping.txt").write_text("n02084071 dog\nn07747607 blood_orange, juice-orange\n")
    return folder
