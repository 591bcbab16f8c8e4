"""Time to the first token and decoding speed, compared with LLaVA and with the memory bandwidth."""

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
from training.workload import QUESTION, photograph
from transformers import PreTrainedModel

from solo_vlm.generate import GenerationPipeline, user_turn

LLAVA = "llava"


def measure(setting: Setting) -> dict[str, Any]:
    """Return seconds to the first token, tokens per second, and ratios to LLaVA's, by batch and image size.

    LLaVA sees every image at the fixed size of its encoder, so it is measured once per batch and round.
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
        for turn in range(1 + setting.rounds):  # the first is a warm-up
            taken = {name: _answer(setting, *model) for name, model in models.items()}
            print(f"batch {batch}, round {turn}: {taken}", file=sys.stderr)
            rounds.append(taken)
        by_batch[str(batch)] = {
            name: {
                "prompt_tokens": inputs["input_ids"].shape[1],
                **_metrics(rounds[1:], name, batch * max(setting.answers)),
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
    """Return bytes per second of a = b + s * c on arrays larger than any cache (STREAM triad, best of 11)."""
    length = 2**20 if setting.tiny else 2**26
    b, c = torch.rand(2, length, device=setting.device)
    a = torch.empty_like(b)

    def triad() -> None:
        torch.add(b, c, alpha=3.0, out=a)

    return 3 * a.nbytes / min(seconds(triad, setting.device) for _ in range(11))


@torch.inference_mode()
def _answer(setting: Setting, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the seconds to the first token, and those of the following tokens."""
    state: dict[str, Any] = {}

    def take(**given: Any) -> None:
        output = model(**given, use_cache=True, logits_to_keep=1)
        state["past_key_values"] = output.past_key_values
        state["input_ids"] = output.logits[:, -1:].argmax(-1)  # (batch, 1)

    def decode() -> None:
        for _ in range(max(setting.answers)):
            take(**state)

    return seconds(lambda: take(**inputs), setting.device), seconds(decode, setting.device)


def _for_llava(setting: Setting, solo: GenerationPipeline, chats: dict[str, Any]) -> dict[str, Tensor]:
    """Return LLaVA's inputs for the same question about an image of its fixed size."""
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


def _metrics(rounds: list[dict[str, tuple[float, float]]], name: str, tokens: int) -> dict[str, float]:
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
    """Return the share of memory bandwidth used by reading decoder, head, keys and values once per step."""
    decoder = model.model.language_model
    weights = sum(weight.numel() for weight in decoder.layers.parameters()) + model.lm_head.weight.numel()
    config = model.config.text_config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    rows, prompt = inputs["input_ids"].shape
    kept = rows * (prompt + max(setting.answers) / 2) * a_token
    step = statistics.median(taken[name][1] for taken in rounds) / max(setting.answers)
    return (weights + kept) * setting.dtype.itemsize / step / bandwidth
