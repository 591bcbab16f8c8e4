"""Interrupted runs resume, possibly in another layout, with the losses of uninterrupted runs.

Every pair of (layout, feature on or off, interruption, layout at resume) occurs in a row of `ROWS`; that is
13 runs instead of the 1,152 of the full product.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import combinations, pairwise, product

import pytest
import torch
from tests.factories import (
    TEXTS,
    ProcessGroup,
    image_rows,
    make_solo,
    read_steps,
    run_settings,
    text_rows,
    write_training_data,
)
from torch.distributed.checkpoint import filesystem

from solo_vlm.check.tiny import tiny_llm
from solo_vlm.models.from_llm import compose
from solo_vlm.models.load import load_model
from solo_vlm.quickstart.llm import train_tokenizer
from solo_vlm.train import Recipe, train, trainer
from solo_vlm.train.failures import Stopped

LAYOUTS = {"one process": (1, 1), "sharded": (2, 1), "tensor": (2, 2)}  # processes, parallel.tensor
INTERRUPTIONS = ("kill -9", "SIGTERM", "SIGTERM twice", "failure")
STEP = 5  # steps before the interruption; the previous checkpoint is that of step 4

FEATURES = {
    "validation": {"validation": {"sources": [{"path": "images.parquet"}], "interval": 2, "sequences": 3}},
    "lora": {"lora": {"rank": 4, "alpha": 8}},
    "accumulation": {"global_batch": 4},
    "workers": {"data": {"workers": 2}},
    "epochs": {"steps": None, "data": {"epochs": 1}},
}

# Layout, interruption, layout at resume, features. Adapters do not support tensor parallelism.
ROWS = [
    ("one process", "kill -9", "one process", "validation lora accumulation epochs"),
    ("one process", "SIGTERM", "one process", "lora"),
    ("one process", "SIGTERM twice", "tensor", "accumulation workers"),
    ("one process", "failure", "sharded", "workers"),
    ("sharded", "kill -9", "tensor", "workers"),
    ("sharded", "SIGTERM", "one process", "validation lora workers"),
    ("sharded", "SIGTERM", "tensor", "accumulation epochs"),
    ("sharded", "SIGTERM twice", "sharded", "lora accumulation epochs"),
    ("sharded", "failure", "one process", "lora accumulation epochs"),
    ("tensor", "kill -9", "sharded", "accumulation workers"),
    ("tensor", "SIGTERM", "sharded", "validation accumulation"),
    ("tensor", "SIGTERM twice", "one process", "validation"),
    ("tensor", "failure", "tensor", "validation workers epochs"),
]


def test_rows_cover_every_pair_of_factors():
    def pairs(layout, interruption, resumed, features):
        levels = [("layout", layout), ("interruption", interruption), ("resumed", resumed)]
        levels += [(feature, feature in features.split()) for feature in FEATURES]
        return set(combinations(levels, 2))

    def is_possible(layout, interruption, resumed, features):
        return "lora" not in features or "tensor" not in (layout, resumed)

    subsets = [
        " ".join(f for f, on in zip(FEATURES, bits, strict=True) if on) for bits in product((0, 1), repeat=5)
    ]
    everything = filter(lambda row: is_possible(*row), product(LAYOUTS, INTERRUPTIONS, LAYOUTS, subsets))
    assert all(is_possible(*row) for row in ROWS)
    assert set().union(*(pairs(*row) for row in everything)) == set().union(*(pairs(*row) for row in ROWS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data for about ten steps and a model."""
    folder = tmp_path_factory.mktemp("interruptions")
    write_training_data(folder, image_rows(16), text_rows(120))
    make_solo().save(folder / "llama")
    return folder


def plain_recipe(folder, out, layout, features):
    plain = run_settings(folder, out, steps=9, global_batch=2, parallel={"tensor": LAYOUTS[layout][1]})
    plain["data"]["streams"] = 4
    for feature in features.split():
        for name, value in FEATURES[feature].items():
            plain[name] = plain[name] | value if name == "data" else value
    return plain


def run_whole(plain):
    train(Recipe.parse(plain))


def resume(plain):
    train(Recipe.parse(plain), resume=True)


def run_until(plain, interruption, victim, step=STEP):
    """Train and interrupt one process in a step; signals also reach its loader workers, as with torchrun."""
    os.setsid()
    optimizer_step = trainer.optimizer_step
    taken = iter(range(step))

    def interrupt():
        if interruption == "kill -9":
            os.kill(os.getpid(), signal.SIGKILL)
        if interruption == "failure":
            raise RuntimeError("the cause")
        if interruption == "SIGTERM twice":
            write_item = filesystem._write_item

            def write_under_fire(*arguments, **options):
                os.killpg(0, signal.SIGTERM)
                return write_item(*arguments, **options)

            filesystem._write_item = write_under_fire
        os.killpg(0, signal.SIGTERM)

    def take_or_interrupt(*arguments):
        if next(taken, None) is None and int(os.environ.get("RANK", 0)) == victim:
            trainer.optimizer_step = optimizer_step
            interrupt()
        return optimizer_step(*arguments)

    trainer.optimizer_step = take_or_interrupt
    try:
        train(Recipe.parse(plain))
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


@pytest.fixture(scope="module")
def whole(folder):
    """Return a function that runs each setting once without interruption, for its output directory."""
    groups = {}

    def start(layout, features):
        out = folder / "whole" / f"{layout}-{features}".replace(" ", "-")
        if out not in groups:
            groups[out] = ProcessGroup(
                LAYOUTS[layout][0], run_whole, plain_recipe(folder, out, layout, features)
            )
        return groups[out], out

    yield start
    for group, _ in groups.items():
        groups[group].kill()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "interruption", "resumed", "features"), [pytest.param(*row, id="-".join(row)) for row in ROWS]
)
def test_resumed_run_matches_uninterrupted_run(
    folder, tmp_path, start, whole, layout, interruption, resumed, features
):
    size = LAYOUTS[layout][0]
    out = tmp_path / "out"
    uninterrupted, expected = whole(layout, features)
    victim = size - 1
    group = start(size, run_until, plain_recipe(folder, out, layout, features), interruption, victim)
    codes = group.wait(90)
    if interruption.startswith("SIGTERM"):
        assert codes == [128 + signal.SIGTERM] * size
    else:
        assert codes[victim] == (-signal.SIGKILL if interruption == "kill -9" else 1)
        assert all(codes)  # all failed
    newest = max((out / "checkpoints").glob("step-*"))
    # A checkpoint being written at the kill may be lost, but not the one before.
    steps = {"kill -9": {2, 4}, "failure": {4}}.get(interruption, {STEP + 1})
    assert int(newest.name.removeprefix("step-")) in steps

    size = LAYOUTS[resumed][0]
    assert start(size, resume, plain_recipe(folder, out, resumed, features)).wait() == [0] * size
    assert uninterrupted.wait() == [0] * LAYOUTS[layout][0]
    ours, theirs = read_steps(out), read_steps(expected)
    names = ("step", "loss", "validation_loss", "learning_rate")
    ours, theirs = ([{n: line[n] for n in names if n in line} for line in lines] for lines in (ours, theirs))
    weights = [load_model(run / "model").state_dict() for run in (out, expected)]
    if layout == resumed:
        assert ours == theirs
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    else:
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        for mine, right in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(right, rel=1e-4)
        for name, right in weights[1].items():
            torch.testing.assert_close(weights[0][name], right, rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["mixtral", "phi3", "deepseek_v2"])
def test_split_and_sharded_run_resumes_in_one_process(folder, tmp_path, start, family):
    """Experts, fused projections and latent attention, over two data-parallel groups of two processes."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    compose(tiny_llm(family), tokenizer).save(tmp_path / family)
    plain = plain_recipe(folder, tmp_path / "out", "tensor", "") | {"model": str(tmp_path / family)}
    alone = plain | {"out": str(tmp_path / "alone"), "parallel": {"tensor": 1}}
    group = start(4, run_until, plain, "SIGTERM", 3)
    assert start(1, run_whole, alone).wait() == [0]
    assert group.wait(90) == [128 + signal.SIGTERM] * 4
    assert start(1, resume, plain | {"parallel": {"tensor": 1}}).wait() == [0]
    ours, theirs = ([line["loss"] for line in read_steps(tmp_path / run)] for run in ("out", "alone"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    weights = [load_model(tmp_path / run / "model").state_dict() for run in ("out", "alone")]
    for name, right in weights[1].items():
        torch.testing.assert_close(weights[0][name], right, rtol=1e-3, atol=1e-4)


# Processes and settings. Every layout is followed by every other one.
ELASTIC = {
    "context": (2, {"context": 2}),
    "context x data": (4, {"context": 2}),
    "replicated": (4, {"replicate": 2}),
    "context x tensor": (4, {"context": 2, "tensor": 2}),
}
CIRCUIT = [list(ELASTIC)[number] for number in (0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0)]


@pytest.mark.distributed
def test_run_killed_in_every_layout_resumes_in_every_other(runs, tmp_path, start):
    assert set(pairwise(CIRCUIT)) == {pair for pair in product(ELASTIC, ELASTIC) if pair[0] != pair[1]}
    plain = run_settings(runs, tmp_path / "out", model="qwen3", steps=len(CIRCUIT))
    plain["checkpoint"] = {"save_interval": 1, "asynchronous": False}
    alone = start(1, run_whole, plain | {"out": str(tmp_path / "alone")})
    *killed, last = CIRCUIT
    for step, layout in enumerate(killed, 1):
        size, parallel = ELASTIC[layout]
        group = start(size, run_until, plain | {"parallel": parallel}, "kill -9", size - 1, 1)
        assert group.wait(90)[-1] == -signal.SIGKILL
        assert (tmp_path / "out" / "checkpoints" / f"step-{step:08d}").is_dir()
    size, parallel = ELASTIC[last]
    assert start(size, resume, plain | {"parallel": parallel}).wait() == [0] * size
    assert alone.wait() == [0]
    ours, theirs = ([line["loss"] for line in read_steps(tmp_path / run)] for run in ("out", "alone"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    weights = [load_model(tmp_path / run / "model").state_dict() for run in ("out", "alone")]
    for name, right in weights[1].items():
        torch.testing.assert_close(weights[0][name], right, rtol=1e-3, atol=1e-4)


def run_with_a_slow_file_system(plain):
    """Process 1 sees no checkpoint, as on a network file system just after another machine's rename."""
    from pathlib import Path

    exists = Path.exists
    if os.environ["RANK"] == "1":
        Path.exists = lambda path: not path.name.startswith("step-") and exists(path)
    run_until(plain, "SIGTERM", 0, step=3)


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [True, False])
def test_rank_0_decides_whether_step_is_saved_already(folder, tmp_path, start, asynchronous):
    """The signal arrives in a step that is saved anyway."""
    plain = plain_recipe(folder, tmp_path / "out", "sharded", "")
    plain["checkpoint"] |= {"asynchronous": asynchronous}
    group = start(2, run_with_a_slow_file_system, plain)
    assert group.wait(90) == [128 + signal.SIGTERM] * 2
    names = [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000002", "step-00000004"]
    assert start(2, resume, plain).wait() == [0, 0]


@pytest.mark.distributed
@pytest.mark.parametrize("keep_gathered", [False, True])
def test_checkpoint_saved_after_validation_loads_in_bf16(folder, tmp_path, start, keep_gathered):
    plain = plain_recipe(folder, tmp_path / "out", "sharded", "validation")
    plain |= {"precision": "bf16", "parallel": {"reshard": not keep_gathered}}
    whole = {**plain, "out": str(tmp_path / "whole")}
    group = start(2, run_whole, whole)
    assert start(2, run_until, plain, "SIGTERM", 0).wait(90) == [128 + signal.SIGTERM] * 2
    assert start(2, resume, plain).wait() == [0, 0]
    assert group.wait() == [0, 0]
    ours, theirs = (
        [(line["loss"], line.get("validation_loss")) for line in read_steps(tmp_path / name)]
        for name in ("out", "whole")
    )
    assert ours == theirs


PLACES = {
    "last step": (trainer, "optimizer_step"),
    "last checkpoint": (filesystem, "_write_item"),
    "export": (trainer, "export_model"),
    "manifest": (trainer, "write_manifest"),
}


def run_to_the_end(plain, place, number):
    """Train, with a signal to the first process at a place where all steps but the last are done."""
    os.setsid()
    owner, name = PLACES[place]
    function = getattr(owner, name)
    before = iter(range(plain["steps"] - 1 if place == "last step" else 0))

    def interrupted(*arguments, **options):
        if os.environ.get("RANK", "0") == "0" and next(before, None) is None:
            os.killpg(0, number)
        return function(*arguments, **options)

    setattr(owner, name, interrupted)
    train(Recipe.parse(plain))


def finish(plain):
    """Resume a run, in which no step may be left."""
    trainer.optimizer_step = None
    train(Recipe.parse(plain))


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_run_told_to_stop_at_its_end_finishes(runs, tmp_path, start, place, size):
    plain = run_settings(runs, tmp_path / "out", steps=4, checkpoint={"save_interval": 100})
    assert start(size, run_to_the_end, plain, place, signal.SIGTERM).wait(90) == [0] * size
    written = (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns
    assert start(size, finish, plain).wait(90) == [0] * size  # as a scheduler does that queued the job again
    assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert [line["step"] for line in read_steps(tmp_path / "out")] == [1, 2, 3, 4]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("features", ["", "epochs"])
def test_run_killed_while_it_exports_repeats_no_step(folder, tmp_path, start, features, size):
    plain = {**plain_recipe(folder, tmp_path / "out", "one process", features), "parallel": {}}
    plain["checkpoint"] = {"save_interval": 3}
    codes = start(size, run_to_the_end, plain, "export", signal.SIGKILL).wait(90)
    assert codes[0] == -signal.SIGKILL
    assert not (tmp_path / "out" / "model").exists()
    before = read_steps(tmp_path / "out")
    assert start(size, finish, plain).wait(90) == [0] * size
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert read_steps(tmp_path / "out") == before
