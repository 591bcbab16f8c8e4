"""QLoRA of the paper's 7B model by `recipes/presets/lora.yaml`, within the memory of a GPU of 24 GB."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from training.machine import in_fresh_process, this_device
from training.workload import RECIPES, Workload

from solo_vlm import SoloConfig, SoloForConditionalGeneration
from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.models.flops import ModelShape
from solo_vlm.train.estimate.memory import memory_per_device
from solo_vlm.train.metrics import read_metrics
from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.trainer import train

SHAPE = "solo-7b"
_TINY = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # which blocks of 4-bit weights divide


def measure(workload: Workload, memory_gb: float, warmup: int, steps: int) -> dict[str, Any]:
    """Return metrics of the median step; a run that needs more memory than given ends in an error of torch.

    Args:
        memory_gb: Memory that torch may allocate on the GPU, in gigabytes.
    """
    with TemporaryDirectory() as folder:
        in_fresh_process(_prepare, workload, Path(folder))
        return in_fresh_process(_train, Path(folder), workload.tiny, memory_gb, warmup, steps)


def _prepare(workload: Workload, folder: Path) -> None:
    """Write a model with random weights in bfloat16, and photographs with questions and answers."""
    torch.set_default_dtype(torch.bfloat16)
    with this_device():
        model = SoloForConditionalGeneration(workload.config(SHAPE, **_TINY if workload.tiny else {}))
    model.save_pretrained(folder / "model")
    workload.processor.save_pretrained(folder / "model")
    write_samples(folder / "data.parquet", workload.chats())


def _train(folder: Path, tiny: bool, memory_gb: float, warmup: int, steps: int) -> dict[str, Any]:
    device = this_device()
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(memory_gb * 1e9 / whole, 1.0), device)
    settings = {
        "model": str(folder / "model"),
        "out": str(folder / "run"),
        "quantize": "nf4",
        "steps": warmup + steps,
        "data.sources": json.dumps([{"path": str(folder / "data.parquet")}]),
        "data.epochs": "null",
        "log_interval": 1,
    }
    if tiny:
        settings |= {"data.sequence_length": 256, "global_batch": 2, "data.streams": 2, "data.workers": 0}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    recipe = Recipe.load(RECIPES / "presets" / "lora.yaml", overrides)
    train(recipe)
    lines = [line for line in read_metrics(recipe.output_dir) if line["step"] > warmup]
    shape = ModelShape.of(SoloConfig.from_pretrained(recipe.model))
    planned = memory_per_device(shape, recipe, ParallelDims.from_recipe(recipe, 1)).total
    return {
        "parameters": shape.parameters.total,
        "sequence_length": recipe.data.sequence_length,
        "sequences": recipe.global_batch,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "memory_limit_gb": memory_gb,
        "peak_memory_gb": max(line["memory_gb"] for line in lines),
        "planned_memory_gb": planned / 1e9,
    }
