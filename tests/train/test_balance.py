"""Dealing sequences to ranks by their FLOPs."""

from __future__ import annotations

import json
import os
from collections import Counter

import numpy as np
import pytest
from tests.factories import read_steps, run_recipe, run_settings
from transformers import Qwen2Config

from solo_vlm.models.flops import ModelShape, forward_flops
from solo_vlm.train import trainer
from solo_vlm.train.balance import deal, waiting

LENGTH, RANKS = 32_768, 32


@pytest.fixture(scope="module")
def shape():
    """Return the shape of a model like Qwen2.5-7B: a vocabulary of 152,064 and no window."""
    sizes = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    return ModelShape.of(
        Qwen2Config(num_hidden_layers=28, intermediate_size=18_944, vocab_size=152_064, **sizes)
    )


def sequence_costs(shape, count, generator):
    """Return the FLOPs of sequences of texts and captioned images, half of the tokens each."""
    costs = []
    for _ in range(count):
        lengths, patches, texts = [], 0, 0
        while True:
            is_image = patches <= texts
            text = int(np.clip(generator.lognormal(*((3.5, 0.7) if is_image else (6.3, 1.3))), 10, LENGTH))
            image = int(np.clip(generator.normal(600, 250), 20, 1024)) if is_image else 0
            if sum(lengths) + text + image > LENGTH:
                break
            lengths.append(text + image)
            patches, texts = patches + image, texts + text
        costs.append(forward_flops(shape, lengths, patches, texts).hardware(recomputed=1))
    return costs


@pytest.mark.parametrize(("batch", "copies"), [(512, 1), (256, 4), (128, 4)])
def test_dealt_sequences_wait_less_than_four_percent(shape, batch, copies):
    generator = np.random.default_rng(0)
    before, after = [], []
    for _ in range(2048 // batch):
        costs = np.array(sequence_costs(shape, batch, generator)).reshape(RANKS, -1).tolist()
        before.append(waiting(costs, copies))
        dealt = [[costs[rank][index] for rank, index in row] for row in deal(costs, copies)]
        after.append(waiting(dealt, copies))
    assert np.mean(before) > 0.10
    assert np.mean(after) < 0.04


@pytest.mark.parametrize("copies", [1, 2, 3, 6])
def test_every_sequence_is_dealt_once_in_neighboring_microbatches(copies):
    costs = np.random.default_rng(0).integers(0, 9, (6, 4)).tolist()
    dealt = deal(costs, copies)
    assert sorted(place for row in dealt for place in row) == [(r, n) for r in range(6) for n in range(4)]
    table = np.array([[costs[rank][index] for rank, index in row] for row in dealt])
    microbatches = table.reshape(copies, 6 // copies, 4).transpose(0, 2, 1).reshape(-1, 6 // copies)
    lowest, highest = microbatches.min(axis=1), microbatches.max(axis=1)
    order = np.lexsort((lowest, highest))
    assert (highest[order][:-1] <= lowest[order][1:]).all()
    assert all((np.diff(row) <= 0).all() for row in highest.reshape(copies, 4))


def test_single_microbatch_moves_nothing():
    assert deal([[3.0], [1.0], [2.0]]) == [[(0, 0)], [(1, 0)], [(2, 0)]]


def test_copy_of_few_heavy_microbatches_gets_many_light_ones():
    dealt = deal([[9.0, 1.0, 1.0], [2.0, 2.0, 5.0]], copies=2)
    assert dealt == [[(0, 0), (0, 1), (0, 2)], [(1, 2), (1, 0), (1, 1)]]


def test_waiting_counts_the_heaviest_of_each_microbatch():
    assert waiting([[4, 1], [2, 1]]) == pytest.approx(1 - 8 / 10)
    assert waiting([[1, 1], [1, 1]]) == 0


def test_copies_wait_for_each_other_at_the_end_of_a_step():
    assert waiting([[4, 1], [1, 4]], copies=2) == 0
    assert waiting([[4, 1], [2, 1], [3, 1], [3, 3]], copies=2) == pytest.approx(1 - 18 / 24)


def record_steps(plain, path):
    """Train, and write the tokens that this rank has computed in each sequence of each step."""
    steps = []
    optimizer_step = trainer.optimizer_step

    def recording(model, optimizer, batches, *arguments):
        steps.append([batch["input_ids"].tolist() for batch in batches])
        return optimizer_step(model, optimizer, batches, *arguments)

    trainer.optimizer_step = recording
    run_recipe(plain)
    path.with_name(f"{path.name}-{os.environ.get('RANK', '0')}").write_text(json.dumps(steps))


@pytest.mark.distributed
@pytest.mark.parametrize("copies", [1, 2])
def test_ranks_compute_the_sequences_of_one_process_in_another_order(runs, tmp_path, start, copies):
    settings = {"steps": 6, "global_batch": 8}
    shared = run_settings(runs, tmp_path / "shared", parallel={"replicate": copies}, **settings)
    group = start(2, record_steps, shared, tmp_path / "shared")
    alone = run_settings(runs, tmp_path / "alone", **settings)
    assert start(1, record_steps, alone, tmp_path / "alone").wait() == [0]
    assert group.wait() == [0, 0]
    ours, theirs = (
        [json.loads((tmp_path / f"{name}-{rank}").read_text()) for rank in range(size)]
        for name, size in (("shared", 2), ("alone", 1))
    )
    for step in range(6):
        dealt = Counter(json.dumps(ids) for rank in ours for ids in rank[step])
        assert dealt == Counter(json.dumps(ids) for ids in theirs[0][step])
    curves = [[line["loss"] for line in read_steps(tmp_path / name)] for name in ("shared", "alone")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
