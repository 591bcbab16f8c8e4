"""A small run to train for real, and the means to start it on several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tiny import png

COLOURS = ("red", "blue", "green")


def images(count):
    """Rows that name the colour of an image of two patches."""
    rows = []
    for colour in COLOURS * count:
        picture = png(Image.new("RGB", (64, 32), colour))
        question = [{"type": "image", "text": None}, {"type": "text", "text": "what is this?"}]
        answer = [{"type": "text", "text": colour}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [{"bytes": picture, "path": None}]})
    return rows


def texts(count):
    """Rows of text alone."""
    return [
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "text", "text": "hello world" * (n % 5 + 1)}]}
            ]
        }
        for n in range(count)
    ]


def write_data(folder, image_rows, text_rows):
    """The files that `settings` names."""
    for name, rows in (("images", image_rows), ("text", text_rows)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=4)


def settings(folder, out, **changes):
    """A recipe for them, as plain settings."""
    return {
        "root": str(folder),
        "model": "llama",
        "out": str(out),
        "steps": 20,
        "global_batch": 4,
        "precision": "fp32",
        "log_every": 1,
        "data": {
            "sources": [{"path": "images.parquet"}, {"path": "text.parquet", "weight": 3}],
            "sequence_length": 64,
            "streams": 8,
            "packing_buffer": 4,
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "min_learning_rate": 1e-4},
        "checkpoint": {"every": 2, "keep": 2},
        "trackers": [],
        **changes,
    }


def run(plain):
    """Train by such settings in this process."""
    from solo_vlm.train import Recipe, train

    train(Recipe.parse(plain))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Group:
    """Processes that torchrun would start, forked from one that has imported everything already."""

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
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers, as under torchrun
    if size > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            LOCAL_RANK="0",
        )
    target(*arguments)
