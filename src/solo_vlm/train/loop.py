"""The training loop: batches in, steps, metrics and checkpoints out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress as ProgressBar
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from solo_vlm.data.collate import PackedBatch
from solo_vlm.data.encode import IGNORE_INDEX
from solo_vlm.data.loader import PackedLoader
from solo_vlm.errors import SoloError
from solo_vlm.files import new_folder
from solo_vlm.train.attention import use_packed_attention
from solo_vlm.train.checkpoint import (
    Progress,
    keep_newest,
    latest_checkpoint,
    load_training_state,
    save_checkpoint,
)
from solo_vlm.train.manifest import write_manifest
from solo_vlm.train.metrics import MetricsLog, progress_bar
from solo_vlm.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.start import load_start, make_loader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What `train` returns: the folder of the trained model, and the run's figures."""

    model: Path
    figures: dict[str, Any]


def train(recipe: Recipe, resume: bool = False, progress: ProgressBar | None = None) -> Trained:
    """Run a recipe to its end.

    A run that was interrupted goes on from its newest checkpoint if it is started again with the same
    recipe; on a CPU its losses are then those of an uninterrupted run, bit for bit.

    Args:
        recipe: the settings.
        resume: insist on going on from a checkpoint.
        progress: a bar to draw on; default: one of its own.

    Raises:
        SoloError: model or data cannot be read, the folder holds another run, nothing is there to resume,
            or the loss is no longer finite.
    """
    if progress is None:
        with progress_bar() as progress:
            return train(recipe, resume, progress)

    out = recipe.at(recipe.out)
    sources = recipe.open_sources()
    checkpoint = _claim(out, recipe, resume)
    set_seed(recipe.seed)
    model, processor = load_start(checkpoint or recipe.model_source())
    model.to(_device()).train()
    use_packed_attention(model)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = make_optimizer(model, recipe.optimizer)
    loader = make_loader(recipe, processor)
    done = Progress()
    if checkpoint:
        done = load_training_state(checkpoint, model, optimizer)
        loader.load_state_dict(done.data or {})
        logger.info("going on from %s", checkpoint)

    log = MetricsLog(out, progress, out.name, recipe.steps, done.step)
    started, tokens_before = time.perf_counter(), done.tokens
    try:
        for figures in _steps(recipe, model, optimizer, loader, done):
            if done.step == 1 or done.step % recipe.log_every == 0 or done.step == recipe.steps:
                log.step(done.step, figures)
            log.advance(done.step)
            if done.step % recipe.checkpoint.every == 0 and done.step < recipe.steps:
                done.data = loader.state_dict()
                save_checkpoint(out / "checkpoints", model, processor, optimizer, done)
                keep_newest(out / "checkpoints", recipe.checkpoint.keep)
    finally:
        log.close()

    seconds = time.perf_counter() - started
    summary = {
        "steps": done.step,
        "tokens": done.tokens,
        "seconds": seconds,
        "tokens_per_second": (done.tokens - tokens_before) / seconds,
        "data": loader.counts(),
        "skipped": loader.skipped(),
    }
    _export(out / "model", model, processor)
    write_manifest(out / "manifest.json", recipe, sources, summary)
    return Trained(out / "model", summary)


def _claim(out: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Make the run's folder ours; return the checkpoint to go on from, if the same run left one."""
    if (out / "model").exists():
        raise SoloError(f"{out} holds a finished run: remove it, or choose another folder with out=...")
    ours = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    theirs = out / "recipe.yaml"
    if theirs.is_file() and theirs.read_text() != ours:
        raise SoloError(f"{out} holds a run of another recipe: remove it, or choose another with out=...")
    checkpoint = latest_checkpoint(out / "checkpoints")
    if resume and checkpoint is None:
        raise SoloError(f"nothing to resume: {out} has no checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    theirs.write_text(ours)
    return checkpoint


def _steps(
    recipe: Recipe,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    loader: PackedLoader,
    done: Progress,
) -> Iterator[dict[str, float]]:
    """Make one optimizer step after the other; yield its figures. Ends early where the data do."""
    batches = iter(loader)
    precision = _precision(recipe, model.device)
    while done.step < recipe.steps:
        started = time.perf_counter()
        global_batch = list(islice(batches, recipe.global_batch))
        if not global_batch:
            logger.warning("the data ended after %d of %d steps", done.step, recipe.steps)
            return
        waited = time.perf_counter() - started
        rate = learning_rate(done.step, recipe.steps, recipe.optimizer)
        set_learning_rate(optimizer, rate)
        loss = _forward_backward(model, global_batch, precision)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            raise SoloError(f"step {done.step + 1}: loss {loss}, gradient norm {norm:g}; lower the rate")
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(batch["input_ids"].numel() for batch in global_batch)
        done.step, done.tokens = done.step + 1, done.tokens + tokens
        yield {
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "tokens_per_second": tokens / (time.perf_counter() - started),
            "data_wait_seconds": waited,
            "supervised_tokens": _supervised(global_batch),
            "vision_tokens": sum(len(batch["pixel_values"]) for batch in global_batch),
        }


def _forward_backward(
    model: PreTrainedModel, batches: list[PackedBatch], precision: AbstractContextManager[Any]
) -> float:
    """Accumulate the gradient of the mean loss over all supervised tokens of the batches."""
    supervised = max(_supervised(batches), 1)
    total = 0.0
    for batch in batches:
        with precision:
            inputs = _inputs(model, batch)
            loss = model(**inputs, use_cache=False, num_items_in_batch=supervised).loss
        loss.backward()
        total += loss.item()
    return total


def _inputs(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """The batch on the model's device; an LLM is not given the (empty) image inputs."""
    images = ("pixel_values", "image_grid_thw")
    return {
        name: value.to(model.device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if model.config.model_type == "solo" or name not in images
    }


def _supervised(batches: list[PackedBatch]) -> int:
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    if recipe.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _export(path: Path, model: PreTrainedModel, processor: Any) -> None:
    with new_folder(path) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
