"""TRL's SFTTrainer on the project's encoder and collator."""

from __future__ import annotations

import json
from itertools import chain

import pyarrow.parquet as pq
import pytest
import torch
from tests.factories import ask

from solo_vlm.data.encode import encode
from solo_vlm.data.sample import parse_sample
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.load import load_model, load_processor

pytest.importorskip("trl", reason="pip install 'solo-vlm[examples]' (make test-examples)")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("lora", [False, True])
def test_assistant_turns_are_trained(folder, tmp_path, lora):
    from trl_sft import PackedCollator, main

    rows = pq.read_table(folder / "chats.parquet").to_pylist()
    model, processor = load_model(folder / "model"), load_processor(folder / "model")
    documents = [encode(parse_sample(row), processor) for row in rows]
    total = supervised = 0
    for document in documents:  # one by one, all logits, no chunks
        patches = torch.from_numpy(document.pixel_values)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(document.input_ids)[None], pixel_values=patches).logits
        labels = torch.from_numpy(document.labels)[1:]
        total += torch.nn.functional.cross_entropy(logits[0, :-1], labels, reduction="sum").item()
        supervised += int((labels != -100).sum())

    main(
        *(folder / "model", str(folder / "chats.parquet"), tmp_path / "out"),
        steps=3,
        batch=len(rows) // 8,  # a step sees all chats
        learning_rate=1e-2,
        lora=lora,
    )
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[0] == pytest.approx(total / supervised, rel=1e-4)
    assert losses[-1] < 0.95 * losses[0]
    pipeline = GenerationPipeline.from_pretrained(tmp_path / "out" / "model")
    assert len(pipeline.answer([ask("hello")], max_new_tokens=3)) == 1

    batch = PackedCollator(processor)(rows[:3])
    assert batch["input_ids"][0].tolist() == list(chain(*(d.input_ids.tolist() for d in documents[:3])))
