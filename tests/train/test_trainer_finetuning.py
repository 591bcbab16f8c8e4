"""Fine-tuning end to end: multi-turn chats, a mixture of images and text, steps without any image."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from tests.factories import CHAT_COLORS, ask, make_solo, write_chats

from solo_vlm.generate import GenerationPipeline
from solo_vlm.train import Recipe, train


@pytest.fixture
def trained(tmp_path):
    write_chats(tmp_path)
    make_solo().save(tmp_path / "start")
    settings = {
        "root": str(tmp_path),
        "model": "start",
        "out": "out",
        "steps": 60,
        "global_batch": 1,
        "precision": "fp32",
        "log_interval": 1,
        "data": {
            "sources": [{"path": "pictures.parquet", "weight": 2}, {"path": "texts.parquet", "weight": 1}],
            "weight_by": "sequences",  # one source per sequence
            "sequence_length": 96,
            "streams": 2,
            "packing_buffer": 4,
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "min_learning_rate": 1e-4},
    }
    return train(Recipe.parse(settings))


def test_mixture_of_image_and_text_chats_is_learned(trained):
    lines = (trained.model.parent / "metrics.jsonl").read_text().splitlines()
    seen = [json.loads(line)["vision_tokens"] for line in lines]
    assert 10 <= seen.count(0) <= 30  # a third of the steps has no image
    assert max(seen) > 0

    pipeline = GenerationPipeline.from_pretrained(trained.model)
    pictures = [ask("what is this?", Image.new("RGB", (64, 32), color)) for color in CHAT_COLORS]
    later = [
        [
            *picture,
            {"role": "assistant", "content": [{"type": "text", "text": color}]},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ]
        for picture, color in zip(pictures, CHAT_COLORS, strict=True)
    ]
    answers = pipeline.answer([*pictures, *later, ask("what is seven?")], max_new_tokens=5)
    assert answers == ["red", "blue", "world", "world", "seven"]
