"""Time to the first token, and tokens a second after it, beside LLaVA and beside what the memory can do."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from answering.models import Setting
from torch import Tensor
from training.machine import seconds
from training.workload import photograph
from transformers import PreTrainedModel

from solo_vlm.generate import GenerationPipeline, user_turn

LLAVA = "llava"
QUESTION = "two people and their dog by the river"


def measure(setting: Setting) -> dict[str, Any]:
    """By batch and image size: seconds to the first token, tokens a second, and their ratios to LLaVA's.

    LLaVA sees every image at the one size of its encoder, so it has one turn a batch and round.
    """
    solo, llava = setting.solo(), setting.llava()
    bandwidth = memory_bandwidth(setting)
    by_batch = {}
    for batch in setting.batches:
        chats = {
            str(size): solo.encode([[user_turn(QUESTION, [photograph(size, size)])]] * batch)
            for size in setting.sizes
        }
        models: dict[str, tuple[PreTrainedModel, Any]] = {LLAVA: (llava, _for_llava(setting, solo, chats))}
        models |= {size: (solo.model, inputs) for size, inputs in chats.items()}
        rounds = []
        for turn in range(1 + setting.rounds):  # the first warms up
            taken = {name: _answer(setting, *model) for name, model in models.items()}
            print(f"batch {batch}, round {turn}: {taken}", file=sys.stderr)
            rounds.append(taken)
        by_batch[str(batch)] = {
            name: {
                "prompt_tokens": inputs["input_ids"].shape[1],
                **_figures(rounds[1:], name, batch * max(setting.answers)),
                "share_of_bandwidth": _share_of_bandwidth(
                    model, inputs, rounds[1:], name, setting, bandwidth
                ),
            }
            for name, (model, inputs) in models.items()
        }
    ratios = {}
    if alone := by_batch.get("1"):
        for ratio in ("ttft_over_llava", "decode_over_llava"):
            ratios[ratio] = {str(size): alone[str(size)][ratio] for size in setting.sizes}
    return {**ratios, "memory_gb_per_second": bandwidth / 1e9, "speed": by_batch}


def memory_bandwidth(setting: Setting) -> float:
    """Bytes a second of a = b + s * c over arrays that no cache holds (STREAM's triad, the best of 11)."""
    length = 2**20 if setting.tiny else 2**26
    b, c = torch.rand(2, length, device=setting.device)
    a = torch.empty_like(b)

    def triad() -> None:
        torch.add(b, c, alpha=3.0, out=a)

    return 3 * a.nbytes / min(seconds(triad, setting.device) for _ in range(11))


@torch.inference_mode()
def _answer(setting: Setting, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Seconds to the first token, and those of the tokens after it."""
    state: dict[str, Any] = {}

    def take(**given: Any) -> None:
        output = model(**given, use_cache=True, logits_to_keep=1)
        state["past_key_values"] = output.past_key_values
        state["input_ids"] = output.logits[:, -1:].argmax(-1)  # (batch, 1)

    def go_on() -> None:
        for _ in range(max(setting.answers)):
            take(**state)

    return seconds(lambda: take(**inputs), setting.device), seconds(go_on, setting.device)


def _for_llava(setting: Setting, solo: GenerationPipeline, chats: dict[str, Any]) -> dict[str, Tensor]:
    """The same question about an image of LLaVA's own size."""
    ids = next(iter(chats.values()))["input_ids"].cpu().numpy()
    text = ~np.isin(ids[0], solo.model.config.vision_token_ids)
    at = int(text.argmin())  # where the image begins
    image = np.full(setting.clip.patches, solo.model.config.image_token_id)
    row = np.insert(ids[0][text], at, image)
    side = setting.clip.image
    return {
        "input_ids": torch.from_numpy(np.tile(row, (len(ids), 1))).to(setting.device),
        "pixel_values": torch.zeros(len(ids), 3, side, side, dtype=setting.dtype, device=setting.device),
    }


def _figures(rounds: list[dict[str, tuple[float, float]]], name: str, tokens: int) -> dict[str, float]:
    def over_llava(place: int) -> float:
        return statistics.median(taken[LLAVA][place] / taken[name][place] for taken in rounds)

    return {
        "first_token_seconds": statistics.median(taken[name][0] for taken in rounds),
        "tokens_per_second": tokens / statistics.median(taken[name][1] for taken in rounds),
        "ttft_over_llava": over_llava(0),
        "decode_over_llava": over_llava(1),
    }


def _share_of_bandwidth(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    rounds: list[dict[str, tuple[float, float]]],
    name: str,
    setting: Setting,
    bandwidth: float,
) -> float:
    """Of the memory's bandwidth, what reading the decoder, the head, keys and values once a step takes."""
    decoder = model.model.language_model
    weights = sum(weight.numel() for weight in decoder.layers.parameters()) + model.lm_head.weight.numel()
    config = model.config.text_config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    rows, prompt = inputs["input_ids"].shape
    kept = rows * (prompt + max(setting.answers) / 2) * a_token
    step = statistics.median(taken[name][1] for taken in rounds) / max(setting.answers)
    return (weights + kept) * setting.dtype.itemsize / step / bandwidth
