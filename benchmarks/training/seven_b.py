"""Training steps of layers of the paper's 7B model on one GPU, on packed sequences of 32,768 tokens."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from training.machine import in_fresh_process, peak_flops, random_model, seconds
from training.workload import Workload

from solo_vlm import SoloForConditionalGeneration
from solo_vlm.data.collate import collate, num_supervised_tokens
from solo_vlm.models.flops import ModelShape, training_flops
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train.activation_checkpointing import prepare_layers
from solo_vlm.train.estimate.layout import Layout
from solo_vlm.train.estimate.memory import USABLE, memory_per_device
from solo_vlm.train.metrics import memory_gb
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.parallel.context import ParallelDims, init_distributed
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.trainer import optimizer_step

SHAPE = "solo-7b"
# Activation checkpointing, and whether layers are compiled; the one expected to be fastest is first.
CONFIGURATIONS = (
    "selective+compile",
    "full+compile",
    "none+compile",
    "selective",
    "full",
    "none",
)
_FEWER = 0.75  # share of the layers to retry with if the estimate was too low


def measure(workload: Workload, configuration: str, warmup: int, steps: int) -> dict[str, Any]:
    """Measure a configuration with as many layers as fit, each attempt in a new process.

    Returns:
        Metrics of the median step, or the reason of a failure as "error".
    """
    checkpointing, _, compiled = configuration.partition("+")
    settings = {"activation_checkpointing": checkpointing, "compile": compiled == "compile"}
    layers = in_fresh_process(_layers_that_fit, workload, settings)
    while layers:
        try:
            return in_fresh_process(_train, workload, settings, layers, warmup, steps)
        except torch.OutOfMemoryError:
            layers = int(_FEWER * layers)
        except Exception as error:  # the other configurations are still worth measuring
            return {"layers": layers, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"layers": 0, "error": "out of memory"}


def _layers_that_fit(workload: Workload, settings: dict[str, Any]) -> int:
    recipe = workload.recipe(**settings)
    whole = workload.config(SHAPE).text_config.num_hidden_layers
    if not torch.cuda.is_available():
        return whole
    memory = USABLE * torch.cuda.get_device_properties(0).total_memory

    def fits(layers: int) -> bool:
        return _planned(workload.config(SHAPE, num_hidden_layers=layers), recipe) <= memory

    return max(filter(fits, range(1, whole + 1)), default=0)


def _planned(config: Any, recipe: Recipe) -> int:
    """Return the estimated memory of a run in bytes."""
    return memory_per_device(Layout.of(config, recipe, ParallelDims.from_recipe(recipe, 1)), recipe).total


def _train(
    workload: Workload, settings: dict[str, Any], layers: int, warmup: int, steps: int
) -> dict[str, Any]:
    recipe = workload.recipe(**settings)
    config = workload.config(SHAPE, num_hidden_layers=layers)
    documents = workload.sequence()
    batches = [collate(documents, workload.length, pad_token_id=0)]
    supervised = num_supervised_tokens(batches)
    with init_distributed(recipe) as context:
        model = random_model(SoloForConditionalGeneration, config, recipe, context)
        isolate_documents(model)
        prepare_layers(model, settings["activation_checkpointing"], recipe.compile)
        optimizer = make_optimizer(model, recipe.optimizer)

        def step() -> None:
            optimizer_step(model, optimizer, batches, supervised, recipe, context)

        for _ in range(warmup):
            step()
        taken = statistics.median(seconds(step, context.device) for _ in range(steps))
        lengths, patches = [len(document) for document in documents], len(batches[0]["pixel_values"])
        shape = ModelShape.of(config)
        flops = training_flops(shape, lengths, patches, supervised)
        peak = peak_flops(context.device)
        return {
            "layers": layers,
            "parameters": shape.parameters.total,
            "step_seconds": taken,
            "tokens_per_second": workload.length / taken,
            "peak_memory_gb": memory_gb(context.device),
            "planned_memory_gb": _planned(config, recipe) / 1e9,
            "documents": len(documents),
            "num_supervised_tokens": supervised,
            **({"mfu": flops / taken / peak} if peak else {}),
        }
