"""Mixture of captions and texts with known counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tests.factories import png

LENGTH = 64  # tokens per packed sequence
SIZES = {(32, 32): 3, (64, 32): 4, (33, 64): 7, (96, 90): 13}  # width, height -> tokens of the layout


@dataclass
class Made:
    """Mixture with its expected counts.

    Attributes:
        file: File of the mixture.
        captions: (image tokens, text tokens) of each caption.
        texts: Tokens of each text.
    """

    file: Path
    captions: list[tuple[int, int]]
    texts: list[int]

    @property
    def folder(self) -> Path:
        return self.file.parent


def caption(image: bytes, text: str) -> dict:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": text}]
    return {"messages": [{"role": "assistant", "content": parts}], "images": [{"bytes": image}]}


@pytest.fixture(scope="session")
def made(tmp_path_factory, solo) -> Made:
    folder = tmp_path_factory.mktemp("mixture")
    solo.save(folder / "model")
    tokenizer = solo.processor.tokenizer
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(["red", "circle", "blue", "seven", "what"], count))

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False)) + 2  # BOS and EOS

    captions, rows = [], []
    for _ in range(120):
        size = list(SIZES)[rng.integers(len(SIZES))]
        text = words(int(rng.integers(1, 5)))
        rows.append(caption(png(Image.new("RGB", size, (200, 30, 30))), text))
        captions.append((SIZES[size], length(text)))
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet", row_group_size=5)
    texts = [words(int(rng.integers(5, 150))) for _ in range(30)]
    lines = [json.dumps({"messages": [{"role": "assistant", "content": text}]}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "root": str(folder),
        "model": "model",
        "data": {
            "sequence_length": LENGTH,
            "sources": [{"path": "captions.parquet", "weight": 3}, {"path": "texts.jsonl"}],
        },
    }
    file = folder / "mixture.yaml"
    file.write_text(yaml.safe_dump(settings))
    return Made(file, captions, list(map(length, texts)))


@pytest.fixture
def broken(tmp_path, made, picture) -> Path:
    """Return a mixture file with unusable rows, one per reason but two without messages."""
    good = png(picture(64, 64))
    rows = [
        caption(good, "a red circle"),
        caption(good[:200], "truncated"),
        caption(png(picture(512, 512)), "too long for the packed sequence"),
        {"messages": [], "images": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "text": None}]}], "images": []},
        {"messages": [], "images": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet", row_group_size=4)
    settings = yaml.safe_load(made.file.read_text())
    settings["root"] = str(tmp_path)
    settings["model"] = str(made.folder / "model")
    settings["data"]["sources"] = [{"path": "bad.parquet"}, {"path": str(made.folder / "texts.jsonl")}]
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file
