"""Sampling of single rows, and padding, against brute force."""

from __future__ import annotations

import torch
from tests.factories import ask

from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve.batch import RowSampler, merge
from solo_vlm.serve.job import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -3.0])


def frequencies(sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    sampler = RowSampler([sampling], torch.device("cpu"))
    chosen = [int(sampler(torch.zeros(1, 1), LOGITS[None].clone()).argmax()) for _ in range(draws)]
    return torch.bincount(torch.tensor(chosen), minlength=4) / draws


def test_samples_follow_the_softmax_at_the_temperature():
    expected = (LOGITS / 0.7).softmax(0)
    assert torch.allclose(frequencies(Sampling(1, temperature=0.7, seed=0)), expected, atol=0.03)


def test_a_temperature_next_to_nothing_is_greedy():
    assert frequencies(Sampling(1, temperature=1e-300, top_p=0.5, seed=0), draws=10)[0] == 1


def test_top_p_leaves_out_the_unlikely_rest():
    expected = torch.tensor([*LOGITS[:2].softmax(0), 0, 0])  # these two have 0.9 of the probability
    assert torch.allclose(frequencies(Sampling(1, temperature=1.0, top_p=0.85, seed=0)), expected, atol=0.03)


def test_a_greedy_row_keeps_its_scores_beside_a_sampled_one():
    sampler = RowSampler([Sampling(1), Sampling(1, temperature=1.0, seed=3)], torch.device("cpu"))
    scores = sampler(torch.zeros(2, 1), LOGITS.repeat(2, 1))
    assert torch.equal(scores[0], LOGITS)
    alone = RowSampler([Sampling(1, temperature=1.0, seed=3)], torch.device("cpu"))
    assert torch.equal(scores[1:], alone(torch.zeros(1, 1), LOGITS[None].clone()))


def test_merged_inputs_are_those_of_a_batch(solo, picture):
    pipeline = GenerationPipeline(solo.model, solo.processor)
    chats = [ask("hello"), ask("what is this? a red circle", picture(64, 96)), ask("and", picture(32, 32))]
    merged = merge([pipeline.encode([chat]) for chat in chats], solo.processor.tokenizer.pad_token_id)
    batch = pipeline.encode(chats)
    assert merged.keys() == batch.keys()
    assert all(torch.equal(merged[name], batch[name]) for name in batch)
