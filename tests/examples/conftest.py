"""Small model, and chats for fine-tuning it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.factories import make_solo, write_chats


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Return a folder with `model/`, `chats.parquet` and `mixture.yaml`."""
    folder = tmp_path_factory.mktemp("examples")
    write_chats(folder)
    make_solo().save(folder / "model")
    settings = {
        "root": str(folder),
        "model": "model",
        "data": {
            "sources": [{"path": "chats.parquet"}],
            "sequence_length": 96,
            "streams": 4,
            "packing_buffer": 8,
        },
    }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(settings))
    return folder
