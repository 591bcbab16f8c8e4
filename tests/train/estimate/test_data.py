"""Runs with `data.epochs` read every row once per epoch, in the planned number of steps."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.packed_runs import steps
from tests.factories import make_solo

from solo_vlm.data.encode import Encoder
from solo_vlm.data.mixture import make_loader
from solo_vlm.models.load import load_processor
from solo_vlm.train import Recipe, train
from solo_vlm.train.estimate.data import estimate_data
from solo_vlm.train.estimate.plan import planned_steps
from solo_vlm.utils.errors import SoloError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs")
    make_solo().save(folder / "start")
    return folder


def write_source(path, rows, rng, per_shard):
    """Write texts of random lengths that change along the file."""
    counts = rng.integers(1, 12, rows) + np.arange(rows) * 12 // rows
    messages = [[{"role": "assistant", "content": "hello world " * int(count)}] for count in counts]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"messages": messages}), path, row_group_size=per_shard)
    else:
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages))


def recipe_of(folder, sources, **changes):
    data = {"sequence_length": 128, "packing_buffer": 8, "sources": [{"path": str(path)} for path in sources]}
    data |= {name: changes.pop(name) for name in ("streams", "epochs", "weight_by") if name in changes}
    plain = {"root": str(folder), "model": "start", "precision": "fp32", "data": data, "trackers": []}
    return Recipe.parse({**plain, "log_interval": 1, **changes})


@cache
def processor_of(path):
    return load_processor(path)


@st.composite
def runs(draw):
    streams = draw(st.sampled_from([1, 4, 8, 24, 64]))
    ranks = draw(st.sampled_from([ranks for ranks in (1, 2, 4) if streams % ranks == 0]))
    return {
        "rows": draw(st.lists(st.integers(1, 300), min_size=1, max_size=3)),
        "per_shard": draw(st.integers(1, 200)),
        "suffix": draw(st.sampled_from(["parquet", "jsonl"])),
        "streams": streams,
        "ranks": ranks,
        "workers": draw(st.sampled_from([n for n in (0, 1, 2) if streams % (ranks * max(n, 1)) == 0])),
        "batch": ranks * draw(st.integers(1, 40)),
        "epochs": draw(st.integers(1, 3)),
        "weight_by": draw(st.sampled_from(["tokens", "samples", "sequences"])),
        "seed": draw(st.integers(0, 2**32)),
    }


def check(folder, run):
    rng = np.random.default_rng(run["seed"])
    paths = [folder / f"{number}.{run['suffix']}" for number in range(len(run["rows"]))]
    for path, rows in zip(paths, run["rows"], strict=True):
        write_source(path, rows, rng, run["per_shard"])
    changes = {name: run[name] for name in ("streams", "epochs", "weight_by")}
    recipe = recipe_of(folder, paths, out="unused", global_batch=run["batch"], **changes)
    processor = processor_of(folder / "start")

    def loaders(workers):
        data = recipe.data.model_copy(update={"workers": workers})
        of_run = recipe.model_copy(update={"data": data})
        sources = of_run.mixture.open_sources()
        return [
            make_loader(of_run.mixture, processor, sources, rank, run["ranks"])
            for rank in range(run["ranks"])
        ]

    taken = steps(loaders(0), run["batch"])
    seen = Counter(name for step in taken for sequence in step for name in sequence)
    assert len(seen) == sum(run["rows"])
    assert set(seen.values()) == {run["epochs"]}
    assert all(len(step) == run["batch"] for step in taken[:-1])
    planned = planned_steps(recipe, recipe.mixture.open_sources())
    assert abs(planned - len(taken)) <= max(1, 0.02 * len(taken))
    documents = estimate_data(recipe, Encoder(processor), recipe.mixture.open_sources()).documents
    assert abs(documents - seen.total()) <= 0.02 * seen.total()
    if run["workers"]:  # one rank at a time, because threads and forks do not mix
        by_workers = Counter()
        for loader in loaders(run["workers"]):
            while not loader.ended:
                for sequence in loader.take(run["ranks"]):
                    by_workers.update(loader.names(sequence))
        assert by_workers == seen


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(runs())
def test_epoch_reads_every_row_once_in_planned_number_of_steps(folder, run):
    check(folder, run)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs())
def test_random_runs_read_every_row_once_in_planned_number_of_steps(folder, run):
    check(folder, run)


@pytest.mark.parametrize(("batch", "streams"), [(1, 4), (6, 24), (8, 64)])
def test_run_trains_on_all_rows(folder, tmp_path, batch, streams):
    write_source(folder / "all.jsonl", 900, np.random.default_rng(0), 0)
    recipe = recipe_of(
        folder,
        [folder / "all.jsonl"],
        out=str(tmp_path / "o"),
        global_batch=batch,
        streams=streams,
        epochs=1,
        optimizer={"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 2},
    )
    metrics = train(recipe).metrics
    assert metrics["data"]["documents"] == 900
    assert metrics["steps"] == planned_steps(recipe, recipe.mixture.open_sources())
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["documents"] for line in lines) == 900
    assert len(lines) == math.ceil(metrics["data"]["sequences"] / batch)
    assert all(line["learning_rate"] > recipe.optimizer.min_learning_rate for line in lines[:-1])


def test_large_sources_are_estimated_from_a_sample(folder):
    """Lengths vary a lot and along the file; the estimate is within 2%."""
    rng = np.random.default_rng(1)
    write_source(folder / "large.jsonl", 12_000, rng, 0)
    recipe = recipe_of(folder, [folder / "large.jsonl"], out="unused", global_batch=4, streams=8, epochs=1)
    loader = make_loader(recipe.mixture, processor_of(folder / "start"), recipe.mixture.open_sources())
    sequences = sum(1 for _ in loader)
    assert (
        abs(planned_steps(recipe, recipe.mixture.open_sources()) - math.ceil(sequences / 4))
        <= 0.02 * sequences / 4
    )


def test_source_of_blank_lines_is_rejected(folder, tmp_path):
    write_source(tmp_path / "text.jsonl", 5, np.random.default_rng(0), 5)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    recipe = recipe_of(folder, [tmp_path / "text.jsonl", tmp_path / "blank.jsonl"], epochs=1, out="out")
    with pytest.raises(SoloError, match=r"blank\.jsonl has no rows"):
        estimate_data(recipe, Encoder(processor_of(folder / "start")), recipe.mixture.open_sources())
