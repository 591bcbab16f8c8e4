"""Small models, chats, data and runs shared by tests of several packages."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from solo_vlm.check.tiny import tiny_llm
from solo_vlm.models.from_llm import SoloModelAndProcessor, compose
from solo_vlm.quickstart.llm import train_tokenizer

# ------------------------------------------------------------------------------- models and images

ROOT = Path(__file__).parents[1]  # root of the repository

TEXTS = ["a red circle left of a blue square. what is this? seven. [INST] [/INST] hello world"] * 3
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # large enough that attention and images matter
}
LLM_CONFIGS = {
    "mistral": lambda **sizes: MistralConfig(sliding_window=8, **sizes),
    "llama": lambda **sizes: LlamaConfig(tie_word_embeddings=True, **sizes),
    "qwen3": lambda **sizes: Qwen3Config(**sizes),
    "gemma": lambda **sizes: GemmaConfig(**sizes),
    "gemma2": lambda **sizes: Gemma2Config(sliding_window=8, **sizes),
    "gemma3": lambda **sizes: Gemma3TextConfig(sliding_window=8, **sizes),
}


def make_llm(family: str = "llama", seed: int = 0, **settings: Any):
    """Make a tiny random causal language model, of any family of transformers, with a real tokenizer."""
    from transformers import AutoModelForCausalLM

    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    settings |= {"vocab_size": len(tokenizer)}
    settings |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    if family not in LLM_CONFIGS:
        return tiny_llm(family, seed, **settings), tokenizer
    config = LLM_CONFIGS[family](pad_token_id=None, **SIZES | settings)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def without_layers():
    """Make an LLM whose layers are in no list."""
    model = tiny_llm("ctrl")
    model.transformer.h = torch.nn.ModuleList()
    return model


def make_solo(family: str = "llama", seed: int = 0, **settings: Any) -> SoloModelAndProcessor:
    llm, tokenizer = make_llm(family, seed, **settings)
    solo = compose(llm, tokenizer, seed=seed)
    # The small initial patch embedding would hide errors with images from comparisons of logits.
    solo.model.model.embed_vision_patch.weight.data.mul_(20.0)
    return solo


def ask(prompt: str, *images: Image.Image) -> list[dict]:
    """Return a chat of one user turn."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def tar_bytes(members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> bytes:
    """Return a tar file with these members in order; pairs may repeat a name."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------- chats

CHAT_COLORS = ("red", "blue")


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "text": None}] * images
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def picture_chat(number: int) -> dict[str, Any]:
    """Return a chat of two turns about an image of two or four patches."""
    color = CHAT_COLORS[number % 2]
    image = Image.new("RGB", (64, 32 * (1 + number % 3 // 2)), color)
    messages = [
        turn("user", "what is this?", images=1),
        turn("assistant", color),
        turn("user", "hello"),
        turn("assistant", "world"),
    ]
    return {"messages": messages, "images": [{"bytes": png(image), "path": None}]}


def text_chat() -> dict[str, Any]:
    """Return a chat without an image."""
    return {"messages": [turn("user", "what is seven?"), turn("assistant", "seven")], "images": []}


def write_chats(folder: Path, count: int = 16) -> None:
    """Write `pictures.parquet`, `texts.parquet`, and `chats.parquet` with both, alternately."""
    pictures, texts = [picture_chat(number) for number in range(count)], [text_chat()] * count
    both = [chat for pair in zip(pictures, texts, strict=True) for chat in pair]
    for name, rows in (("pictures", pictures), ("texts", texts), ("chats", both)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=4)


# --------------------------------------------------------------------------------- training runs

COLORS = ("red", "blue", "green")


def image_rows(count):
    """Return rows that name the color of an image of two patches."""
    rows = []
    for color in COLORS * count:
        picture = png(Image.new("RGB", (64, 32), color))
        question = [{"type": "image", "text": None}, {"type": "text", "text": "what is this?"}]
        answer = [{"type": "text", "text": color}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [{"bytes": picture, "path": None}]})
    return rows


def text_rows(count):
    """Return text-only rows."""
    return [
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "text", "text": "hello world" * (n % 5 + 1)}]}
            ]
        }
        for n in range(count)
    ]


def write_training_data(folder, images, texts):
    """Write the files that `run_settings` refers to."""
    for name, rows in (("images", images), ("text", texts)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=4)


def run_settings(folder, out, **changes):
    """Return a recipe for `write_training_data`, as plain settings."""
    return {
        "root": str(folder),
        "model": "llama",
        "out": str(out),
        "steps": 20,
        "global_batch": 4,
        "precision": "fp32",
        "log_interval": 1,
        "data": {
            "sources": [{"path": "images.parquet"}, {"path": "text.parquet", "weight": 3}],
            "sequence_length": 64,
            "streams": 8,
            "packing_buffer": 4,
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "min_learning_rate": 1e-4},
        "checkpoint": {"save_interval": 2, "keep": 2},
        "trackers": [],
        **changes,
    }


def run_recipe(plain):
    """Train in this process with the settings of `run_settings`."""
    from solo_vlm.train import Recipe, train

    train(Recipe.parse(plain))


def run_mixed_checkpointing(plain):
    """Train on devices whose memory lets "auto" recompute the first of two layers."""
    from solo_vlm.models.load import load_config
    from solo_vlm.train import Recipe, train, trainer
    from solo_vlm.train.activation_checkpointing import LayerModes
    from solo_vlm.train.estimate.layout import Layout
    from solo_vlm.train.estimate.memory import USABLE, memory_per_device

    recipe = Recipe.parse({**plain, "activation_checkpointing": "auto"})

    def memory(context):
        layout = Layout.of(load_config(recipe.mixture.model_source()), recipe, context.dims)
        mixed = replace(layout, modes=LayerModes(full=1, selective=1))
        return math.ceil(memory_per_device(mixed, recipe).total / USABLE)

    trainer.device_memory = memory
    train(recipe)
    assert read_modes(recipe.output_dir) == {"full": 1, "selective": 1, "none": 0}


def read_modes(out):
    """Return the numbers of layers by activation checkpointing from a run's manifest."""
    return json.loads((out / "manifest.json").read_text())["outcome"]["activation_checkpointing"]


def read_steps(out):
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class ProcessGroup:
    """Processes like torchrun's, forked from one that has already imported everything."""

    def __init__(self, size, target, *arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["solo_vlm.train.trainer", "solo_vlm.models.solo.modeling_solo"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            context.Process(target=_enter, args=(rank, size, port, target, arguments)) for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def kill(self):
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self, timeout=240):
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]


def _enter(rank, size, port, target, arguments):
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # start method of loader workers, as under torchrun
    if size > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            LOCAL_RANK="0",
        )
    target(*arguments)


@contextmanager
def locked_by_another_process(folder: Path) -> Iterator[None]:
    """Hold the lock of an output directory."""
    holder = "import sys; from pathlib import Path; from solo_vlm.utils.files import lock_output_dir\n"
    holder += "held = lock_output_dir(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        yield
        other.kill()


class SmallDisk:
    """A file system of a few pages in memory; needs the right to mount it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=12k", "tmpfs")

    def resize(self, size: str) -> None:
        self._mount("-o", f"remount,size={size}")

    def allow_writing(self, allowed: bool) -> None:
        self._mount("-o", f"remount,{'rw' if allowed else 'ro'}")

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, self.folder], check=True, capture_output=True)
