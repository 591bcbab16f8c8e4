"""Trained model with its runs and evaluation, in folders whose names must not be published."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.evaluate.benchmark_rows import correct_response, make_rows
from tests.factories import image_rows, make_solo, run_settings, text_rows

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.predictions import Prediction, without_images
from solo_vlm.evaluate.run import ModelInfo
from solo_vlm.evaluate.run_folder import RunFolder, weights_hash
from solo_vlm.hub.upload import Publication
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.trainer import train


@pytest.fixture(scope="session")
def evaluate():
    """Return a function that writes the scores of a model: MME in full, MMStar in part."""

    def evaluate(folder, model):
        scores = []
        for task in ("mme", "mmstar"):
            rows = make_rows(task)
            answers = [
                Prediction(str(n), correct_response(task, r), without_images(r)) for n, r in enumerate(rows)
            ]
            scores.append(get(task).score(answers))
        run = RunFolder(folder)
        run.write_scores([replace(scores[0], n=scores[0].expected_n), scores[1]])
        facts = ModelInfo(str(model), "transformers", weights_hash(model)).as_dict()
        run.write_metadata({"model": facts, "settings": {}, "versions": {"torch": "1.2.3"}, "tasks": {}})

    return evaluate


@pytest.fixture(scope="session")
def home(tmp_path_factory, evaluate):
    """Return a folder with two finished runs, `stage1` and `sft`, and the latter's `evaluation`."""
    home = tmp_path_factory.mktemp("alice-at-her-desk")
    broken = {"messages": [{"role": "user", "content": [{"type": "image", "text": None}]}], "images": []}
    for name, rows in (
        ("gqa", [row for image in image_rows(24) for row in (image, broken)]),
        ("notes", text_rows(64)),
    ):
        (home / "data" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), home / "data" / name / "part-0.parquet", row_group_size=4)
    make_solo().save(home / "llama")
    data = {
        "sources": [{"path": "data/gqa", "weight": 1}, {"path": str(home / "data/notes"), "weight": 3}],
        "sequence_length": 64,
        "streams": 2,
        "packing_buffer": 4,
        "max_skipped": 1,
    }
    for start, name in (("llama", "stage1"), ("stage1/model", "sft")):
        train(Recipe.parse(run_settings(home, home / name, model=start, steps=4, data=data)))
    evaluate(home / "evaluation", home / "sft/model")
    return home


@pytest.fixture(scope="session")
def publication(home):
    return Publication(
        model=home / "sft/model",
        repo_id="owner/tiny-solo",
        runs=[home / "stage1", home / "sft"],
        evaluation=home / "evaluation",
        license="apache-2.0",
        base_model="owner/tiny-llm",
    )


@pytest.fixture(scope="session")
def published(publication, tmp_path_factory):
    """Return the published folder."""
    out = tmp_path_factory.mktemp("published") / "tiny-solo"
    publication.write(out)
    return out


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """Return a JPEG that needs no resizing."""
    file = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(file, quality=95)
    return file
