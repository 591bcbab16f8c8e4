"""Heads split over the vocabulary: loss, gradients and logits of one process."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.factories import make_solo, run_settings
from torch.distributed.tensor import DTensor

from solo_vlm.train import Recipe
from solo_vlm.train.parallel.context import init_distributed
from solo_vlm.train.parallel.sharding import shard_model

FAMILIES = ["qwen3", "phi", "granite"]  # plain, with a bias, with scaled logits


def compare_heads(plain, path):
    """Write by family: rows of the head in this process, and errors of loss, gradients and logits."""
    recipe, found = Recipe.parse(plain), {}
    ids = torch.randint(3, 280, (1, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.where(ids % 3 > 0, -100)
    with init_distributed(recipe) as context:
        for family in FAMILIES:
            alone = make_solo(family, tie_word_embeddings=False).model
            model = copy.deepcopy(alone)
            shard_model(model, recipe, context)
            outcomes = []
            for each in (alone.eval(), model.eval()):
                output = each(input_ids=ids, labels=labels, use_cache=False)
                output.loss.backward()
                gradients = [p.grad for p in each.parameters() if p.grad is not None]
                whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
                outcomes.append([output.loss[None], output.logits, *whole])
            errors = [
                float((one - other).norm() / one.norm().clamp(min=1e-3))
                for one, other in zip(*outcomes, strict=True)
            ]
            rows = model.lm_head.weight.to_local().shape[0] / alone.lm_head.weight.shape[0]
            found[family] = rows, max(errors)
    path.with_name(f"{path.name}-{context.rank}").write_text(json.dumps(found))


@pytest.mark.distributed
def test_split_head_matches_single_process(start, tmp_path):
    plain = run_settings(tmp_path, tmp_path / "out", parallel={"tensor": 2})
    assert start(2, compare_heads, plain, tmp_path / "found").wait() == [0, 0]
    for rank in range(2):
        for family, (rows, error) in json.loads((tmp_path / f"found-{rank}").read_text()).items():
            assert rows == 0.5 and error < 1e-4, family
