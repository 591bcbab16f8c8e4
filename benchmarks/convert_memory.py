"""Peak memory of `solo convert` on synthetic checkpoints.

    python benchmarks/convert_memory.py [--gigabytes 2] [--json]

Prints, per format, the size of the weights and the peak memory of the converting process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from environment import environment
from safetensors.torch import save_file

HIDDEN, MLP, HEADS, KEY_VALUE_HEADS, ROWS = 2048, 7168, 16, 8, 33152
ARCHITECTURE = {
    "architectures": ["SoloForCausalLM"],
    "model_type": "mistral",
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
# Runs the command and prints its peak memory. On Linux, ru_maxrss includes the memory of the parent process,
# VmHWM does not.
MEASURED = """
import re, resource, sys
from pathlib import Path
from solo_vlm.cli import main
sys.argv = ["solo", "convert", *sys.argv[1:], "--json"]
try:
    main()
except SystemExit as stop:
    if stop.code:
        raise
status = Path("/proc/self/status")
if status.exists():
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS: bytes
"""


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def outer_weights() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": zeros(ROWS, HIDDEN),
        "model.embed_vision_patch.weight": zeros(HIDDEN, 3072),
        "model.norm.weight": zeros(HIDDEN),
        "lm_head.weight": zeros(ROWS, HIDDEN),
    }


def layer_weights() -> dict[str, torch.Tensor]:
    head = HIDDEN // HEADS
    return {
        "input_layernorm": zeros(HIDDEN),
        "post_attention_layernorm": zeros(HIDDEN),
        "self_attn.q_proj": zeros(HIDDEN, HIDDEN),
        "self_attn.k_proj": zeros(KEY_VALUE_HEADS * head, HIDDEN),
        "self_attn.v_proj": zeros(KEY_VALUE_HEADS * head, HIDDEN),
        "self_attn.o_proj": zeros(HIDDEN, HIDDEN),
        "mlp.gate_proj": zeros(MLP, HIDDEN),
        "mlp.up_proj": zeros(MLP, HIDDEN),
        "mlp.down_proj": zeros(HIDDEN, MLP),
    }


def layers_for(size: float) -> int:
    outer, layer = (sum(w.nbytes for w in weights.values()) for weights in (outer_weights(), layer_weights()))
    return max(1, round((size - outer) / layer))


def make_original(folder: Path, layers: int, suffix: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**ARCHITECTURE, "num_hidden_layers": layers}))
    weights = outer_weights()
    for number in range(layers):
        weights |= {f"model.layers.{number}.{name}.weight": w for name, w in layer_weights().items()}
    if suffix == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


def make_megatron(folder: Path, layers: int) -> Path:
    """Write a checkpoint of two ranks, each in one pickle."""
    arguments = Namespace(
        num_layers=layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=MLP,
        num_attention_heads=HEADS,
        num_attention_heads_kv=KEY_VALUE_HEADS,
    )
    fused = HIDDEN + 2 * HIDDEN // HEADS * KEY_VALUE_HEADS
    encoder = {"final_layernorm.weight": zeros(HIDDEN)}
    for number in range(layers):
        encoder |= {
            f"layers.{number}.input_layernorm.weight": zeros(HIDDEN),
            f"layers.{number}.post_attention_layernorm.weight": zeros(HIDDEN),
            f"layers.{number}.self_attention.query_key_value.weight": zeros(fused // 2, HIDDEN),
            f"layers.{number}.self_attention.dense.weight": zeros(HIDDEN, HIDDEN // 2),
            f"layers.{number}.mlp.dense_h_to_4h.weight": zeros(MLP, HIDDEN),
            f"layers.{number}.mlp.dense_4h_to_h.weight": zeros(HIDDEN, MLP // 2),
        }
    model = {
        "embedding": {"word_embeddings": {"weight": zeros(ROWS // 2, HIDDEN)}},
        "embed_vision_patch": {"weight": zeros(HIDDEN // 2, 3072)},
        "encoder": encoder,
        "lm_head": zeros(ROWS // 2, HIDDEN),
    }
    for rank in range(2):
        file = folder / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"args": arguments, "model": {"language_model": model}}, file)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def measure(verb: str, source: Path, out: Path) -> tuple[int, int]:
    """Convert in a new process; return bytes of weights, and peak memory in bytes."""
    command = [sys.executable, "-c", MEASURED, verb, str(source), str(out)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts, peak = result.stdout.strip().splitlines()
    return json.loads(facts)["bytes"], int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    layers = layers_for(arguments.gigabytes * 1e9)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = [
            ("release, safetensors", "release", lambda: make_original(folder / "a", layers, "safetensors")),
            ("release, .bin", "release", lambda: make_original(folder / "b", layers, "bin")),
            ("megatron, 2 ranks", "megatron", lambda: make_megatron(folder / "c", layers)),
            ("to-release", "to-release", lambda: folder / "out1"),
        ]
        for number, (name, verb, make) in enumerate(runs):
            size, peak = measure(verb, make(), folder / f"out{number}")
            results[name] = {"weights_gb": size / 1e9, "peak_gb": peak / 1e9}
            if not arguments.json:
                print(f"{name:22} {size / 1e9:5.2f} GB of weights, peak memory {peak / 1e9:5.2f} GB")
    if arguments.json:
        print(json.dumps({**results, "environment": environment()}))


if __name__ == "__main__":
    main()
