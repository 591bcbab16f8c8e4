"""Seconds of `solo check`, of the check before training, and of `solo init` with and without its checks.

    python benchmarks/check.py [--shape 135m | 7b] [--layers N] [--init-only] [--json] [--out FILE]

The LLM is a Llama of random weights, in the shape of SmolLM2-135M or Mistral-7B, stored in bfloat16; with
--layers, of that depth. All parts run one after another on the same machine; on a busy one, look at the
processor time.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from environment import environment, publish
from transformers import AutoModelForCausalLM, LlamaConfig

from solo_vlm.check.certificate import certify_init, require_exact_packing
from solo_vlm.cli._common import quiet_libraries
from solo_vlm.models.checks import check_weights
from solo_vlm.models.from_llm import from_llm
from solo_vlm.models.load import load_model
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.quickstart.llm import train_tokenizer

Times = dict[str, tuple[float, float]]  # seconds and processor seconds by part

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--layers", type=int, help="default: those of the shape")
    parser.add_argument("--init-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    arguments = parser.parse_args()
    quiet_libraries()
    settings = dict(SHAPES[arguments.shape])
    if arguments.layers:
        settings["num_hidden_layers"] = arguments.layers
    with tempfile.TemporaryDirectory() as temporary:
        times, parameters = measure(Path(temporary), settings, arguments.init_only)
    results = {
        "shape": arguments.shape,
        "layers": settings["num_hidden_layers"],
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "seconds": {name: round(wall, 2) for name, (wall, _) in times.items()},
        "processor_seconds": {name: round(busy, 2) for name, (_, busy) in times.items()},
        "init_ratio": round(1 + times["checks of init"][0] / times["init"][0], 3),
        "environment": environment(),
    }
    publish(results, arguments.json, arguments.out)
    if arguments.json:
        return
    print(f"{parameters:,} parameters, {results['threads']} threads")
    for name, (wall, busy) in times.items():
        print(f"{name:24} {wall:8.2f} s {busy:8.2f} s of processor time")
    print(f"init with checks takes {results['init_ratio']:.2f} times as long as without")


def measure(folder: Path, settings: dict[str, Any], init_only: bool) -> tuple[Times, int]:
    """Return seconds and processor seconds by part, and the number of parameters."""
    make_llm(folder / "llm", settings)
    times: Times = {}
    warm_up = from_llm(folder / "llm")  # imports, and caches of the files
    certify_init(warm_up.model, warm_up.processor, "llm")
    del warm_up
    with timed(times, "init"):
        solo = from_llm(folder / "llm")
        solo.save(folder / "solo")
    with timed(times, "checks of init"):
        certify_init(solo.model, solo.processor, "llm")
        check_weights(
            folder / "solo",
            lambda: SoloForConditionalGeneration(SoloConfig.from_pretrained(str(folder / "solo"))),
        )
    parameters = solo.model.num_parameters()
    del solo
    if init_only:
        return times, parameters
    model = load_model(folder / "solo", "float32", "cpu")
    with timed(times, "check before training"):
        require_exact_packing(model, "solo")
    del model
    with timed(times, "solo check"):
        command = ["check", str(folder / "solo"), "--llm", str(folder / "llm")]
        subprocess.run([sys.executable, "-m", "solo_vlm", *command], check=True, stdout=subprocess.DEVNULL)
    return times, parameters


@contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    """Add the wall time and the processor time of a block."""
    wall, busy = time.perf_counter(), _processor_seconds()
    yield
    times[name] = time.perf_counter() - wall, _processor_seconds() - busy


def _processor_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def make_llm(folder: Path, settings: dict[str, Any]) -> None:
    """Save a Llama of random weights with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    train_tokenizer(["only quiet zebras jump"] * 3, 400).save_pretrained(folder)


if __name__ == "__main__":
    main()
