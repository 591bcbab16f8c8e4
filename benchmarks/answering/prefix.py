"""Ten questions about one image of 1024 x 1024 pixels, with and without a prefix cache."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from answering.models import Setting
from PIL import Image
from training.machine import seconds
from training.workload import photograph

from solo_vlm.generate import GenerationPipeline, PrefixCache, user_turn

QUESTIONS = [
    *(
        "who is in the town",
        "what is by the river",
        "is it early or late",
        "how many people",
        "where is the dog",
    ),
    *(
        "what is old in the photograph",
        "is there light",
        "is there a river",
        "two people or one",
        "what is this",
    ),
]


def measure(setting: Setting) -> dict[str, Any]:
    """Return the speedup of answering all questions, by the length of the answers."""
    solo = setting.solo()

    def cached() -> GenerationPipeline:
        return GenerationPipeline(solo.model, solo.processor, PrefixCache())

    by_length = {str(tokens): take_turns(setting, solo, cached, tokens) for tokens in setting.answers}
    first = by_length[str(setting.answers[0])]
    return {
        "prefix_speedup": first["speedup"],
        "prefix_same_answers": all(metrics["same_answers"] for metrics in by_length.values()),
        "prefix": {
            "questions": len(QUESTIONS),
            "image": max(setting.sizes),
            "threads": torch.get_num_threads(),
            "by_answer_tokens": by_length,
        },
    }


def take_turns(
    setting: Setting, solo: GenerationPipeline, other: Callable[[], GenerationPipeline], tokens: int
) -> dict[str, Any]:
    """Return the timings for one length of answers; both variants alternate at each question.

    Args:
        solo: Pipeline without the feature.
        other: Function that makes the pipeline with the feature, called once per round.
        tokens: Length of the answers.
    """
    image = photograph(*[max(setting.sizes)] * 2)
    rounds, same = [], True
    for turn in range(1 + setting.rounds):  # the first is a warm-up
        pipelines = {"without": solo, "with": other()}
        taken = dict.fromkeys(pipelines, 0.0)
        answers: dict[str, list[str]] = {name: [] for name in pipelines}
        # A GPU loads kernels for every new length of a prompt.
        for question in QUESTIONS if turn or setting.device.type != "cpu" else QUESTIONS[:2]:
            for name, pipeline in pipelines.items():
                ask = partial(_ask, pipeline, question, image, tokens, answers[name])
                taken[name] += seconds(ask, setting.device)
        print(f"answers of {tokens} tokens, round {turn}: {taken}", file=sys.stderr)
        same &= answers["without"] == answers["with"]
        rounds.append(taken)
    return {
        "speedup": statistics.median(taken["without"] / taken["with"] for taken in rounds[1:]),
        "same_answers": same,
        **{f"seconds_{name}": statistics.median(taken[name] for taken in rounds[1:]) for name in rounds[0]},
    }


def _ask(
    pipeline: GenerationPipeline, question: str, image: Image.Image, tokens: int, answers: list[str]
) -> None:
    output = pipeline.stream([user_turn(question, [image])], lambda text: None, tokens)
    answers.append(output.text or "")
