"""Accelerate with DeepSpeed matches a plain loop, on one process and on two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
from tests.factories import ROOT
from transformers import get_cosine_schedule_with_warmup

from solo_vlm.data.mixture import Mixture, make_loader
from solo_vlm.models.load import load_model, load_processor
from solo_vlm.models.packed.isolation import isolate_documents

pytest.importorskip("deepspeed", reason="pip install 'solo-vlm[examples]' (make test-examples)")
pytestmark = pytest.mark.distributed

EXAMPLE = ROOT / "examples" / "accelerate_deepspeed.py"
STEPS, BATCH, RATE = 4, 4, 3e-3


@pytest.fixture(scope="module")
def expected(folder) -> list[float]:
    model = load_model(folder / "model", dtype="float32").train()
    isolate_documents(model)
    mixture = Mixture.load(folder / "mixture.yaml")
    batches = iter(make_loader(mixture, load_processor(folder / "model"), mixture.open_sources()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    losses = []
    for _ in range(STEPS):
        group = list(islice(batches, BATCH))
        supervised = sum(int((batch["labels"] != -100).sum()) for batch in group)
        loss = sum(model(**batch, use_cache=False, num_items_in_batch=supervised).loss for batch in group)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("processes", "stage"), [(1, 2), (2, 2), (2, 3)])
def test_losses_match_a_plain_loop(folder, tmp_path, expected, processes, stage):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), str(EXAMPLE)),
        *("--model", folder / "model", "--data", folder / "mixture.yaml", "--out", tmp_path),
        *("--steps", str(STEPS), "--batch", str(BATCH // processes), "--zero-stage", str(stage)),
        *("--learning-rate", str(RATE), "--precision", "no"),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)", done.stdout, re.MULTILINE)]
    assert losses == pytest.approx(expected, rel=1e-4)
    trained, start = (load_model(path) for path in (tmp_path / "model", folder / "model"))
    before = start.state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
