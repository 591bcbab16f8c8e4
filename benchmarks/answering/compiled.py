"""Ten questions about one image, with and without a compiled decoding step (`solo generate --compile`)."""

from __future__ import annotations

from typing import Any

from answering.models import Setting
from answering.prefix import QUESTIONS, take_turns

from solo_vlm.generate import GenerationPipeline


def measure(setting: Setting) -> dict[str, Any]:
    """Return the speedup of the longest answers; the first round, which compiles, does not count.

    On a CPU only the cache differs, which is static.
    """
    solo = setting.solo()
    tokens = max(setting.answers)
    compiled = GenerationPipeline(solo.model, solo.processor, compile=True)
    timings = take_turns(setting, solo, lambda: compiled, tokens)
    return {
        "compile_speedup": timings["speedup"],
        "compiled": {
            "questions": len(QUESTIONS),
            "image": max(setting.sizes),
            "answer_tokens": tokens,
            **timings,
        },
    }
