"""Copies of benchmark images and questions planted in a training mixture."""

from __future__ import annotations

import base64
import json
import re
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tests.evaluate.evaluation_runs import noise, open_task, write_rows
from tests.factories import png

from solo_vlm.data.mixture import Mixture
from solo_vlm.evaluate.contamination.check import check_mixture
from solo_vlm.evaluate.contamination.matching import split_words

SENTENCE = "the old mill stands near a small river where two boats lie under many tall green trees and birds"
QUESTIONS = [
    " ".join(np.random.default_rng(n).permutation(SENTENCE.split())).capitalize() + "?" for n in range(12)
]
OPTIONS = ["a spotted dog", "a tabby cat", "a mountain goat", "none of these"]


@pytest.fixture
def benchmark(tmp_path):
    """Twelve rows of AI2D; the image of row n (from 1) is noise(n)."""
    rows = [
        {
            "question": question,
            "options": OPTIONS,
            "answer": "1",
            "image": {"bytes": png(noise(number, 200, 160)), "path": None},
        }
        for number, question in enumerate(QUESTIONS, start=1)
    ]
    write_rows(tmp_path / "benchmarks", "ai2d", rows)
    return tmp_path / "benchmarks"


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def sample(text: str, *images: bytes) -> dict:
    parts = [*[{"type": "image", "text": None} for _ in images], {"type": "text", "text": text}]
    return {
        "messages": [{"role": "assistant", "content": parts}],
        "images": [{"bytes": image} for image in images],
    }


def write_mixture(folder, rows):
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=8)
    settings = {"root": str(folder), "model": "none", "data": {"sources": [{"path": "train.parquet"}]}}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(settings))
    return folder / "mixture.yaml"


@pytest.fixture
def mixture(tmp_path):
    """Thirty rows: one is broken, two contain rows 5 and 9 of the benchmark."""
    rows = [sample(f"a picture of number {n}, nothing else", png(noise(1000 + n, 96, 64))) for n in range(30)]
    rows[3] = sample("broken", png(noise(1))[:50])
    rows[12] = sample("two pictures", png(noise(2000)), jpeg(noise(5, 200, 160).resize((90, 72)), 40))
    quoted = QUESTIONS[8].upper().replace(" ", " -- ", 3).replace("?", " ...")
    rows[21] = sample(f"First something else. {quoted} Then the end of it.")
    return write_mixture(tmp_path / "mixture", rows)


def test_finds_exactly_the_planted_rows(benchmark, mixture, run, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "found"
    arguments = ["--tasks", "ai2d", "--data-root", benchmark, "--mixture", mixture, "--out", out]
    code, stdout, error = run("eval", "contamination", *arguments, "--json")
    assert code == 0, error
    facts = json.loads(stdout)
    assert facts == json.loads((out / "contamination.json").read_text())
    image, question = sorted(facts["matches"], key=lambda match: match["kind"])
    assert (image["kind"], image["task"], image["id"]) == ("image", "ai2d", "5")
    assert image["where"].endswith("train.parquet, row group 1, row 4")
    assert image["distance"] <= 4
    assert (question["kind"], question["id"]) == ("question", "9")
    assert question["where"].endswith("train.parquet, row group 2, row 5")
    assert question["words"] in " ".join(split_words(QUESTIONS[8]))
    found = facts["tasks"]["ai2d"]
    assert (found["rows"], found["images"], found["questions"], found["run_length"]) == (12, 12, 12, 13)
    assert (found["image_matches"], found["question_matches"]) == ({"5": 1}, {"9": 1})
    assert (facts["training_rows"], facts["training_images"], facts["skipped"]) == (30, 29, {"image": 1})
    code, table, _ = run("eval", "contamination", *arguments)
    assert code == 0
    assert "1 rows" in table
    page = (out / "contamination.html").read_text()
    pair = [
        Image.open(BytesIO(base64.b64decode(data)))
        for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    ]
    assert [picture.size for picture in pair] == [(200, 160), (90, 72)]
    assert question["words"] in page


def test_workers_find_the_same_matches(benchmark, mixture, tmp_path):
    rows = {"ai2d": open_task("ai2d", benchmark, tmp_path / "cache")}
    here, there = (check_mixture(rows, Mixture.load(mixture), workers=workers) for workers in (0, 2))
    assert here == there
    assert len(here.matches) == 2


def test_common_phrase_is_not_a_match(benchmark, tmp_path):
    rows = {"ai2d": open_task("ai2d", benchmark, tmp_path / "cache")}
    for copies, found in ((10, 10), (11, 0)):
        mixture = write_mixture(tmp_path / f"{copies}", [sample(QUESTIONS[2]) for _ in range(copies)])
        assert len(check_mixture(rows, Mixture.load(mixture)).matches) == found


def test_all_matches_are_counted_and_ten_are_listed(benchmark, tmp_path):
    rows = {"ai2d": open_task("ai2d", benchmark, tmp_path / "cache")}
    mixture = write_mixture(tmp_path / "m", [sample("same", png(noise(4, 200, 160))) for _ in range(15)])
    found = check_mixture(rows, Mixture.load(mixture))
    assert found.tasks["ai2d"].image_matches == {"4": 15}
    assert len(found.matches) == 10
