"""Variants of training on the same samples, each with the optimizer step of `solo train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from training.llava import CLIP_L, TINY_CLIP, LlavaBaseline
from training.machine import random_model
from training.padding import in_batches, padded
from training.workload import Workload
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from solo_vlm import SoloForConditionalGeneration
from solo_vlm.data.collate import collate, num_supervised_tokens
from solo_vlm.data.encode import Document
from solo_vlm.models.flops import ModelShape, training_flops
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.trainer import optimizer_step

SHAPE = "smollm2-135m"
OURS, PADDED, FULL_LOGITS, LLAVA = "packed", "padded", "packed_full_logits", "llava"
NAMES = (OURS, PADDED, FULL_LOGITS, LLAVA)


class FullLogits:
    """SOLO model with transformers' standard loss over the logits of all positions."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.device = model.device

    def __call__(self, *, labels: Tensor, num_items_in_batch: int, **inputs: Any) -> SimpleNamespace:
        logits = self.model(**inputs).logits
        vocabulary = self.config.text_config.vocab_size
        return SimpleNamespace(loss=ForCausalLMLoss(logits, labels, vocabulary, num_items_in_batch))


@dataclass
class Variant:
    """Variant of training.

    Attributes:
        model: Model, or a wrapper with the same interface.
        optimizer: Optimizer of its trainable parameters.
        batches: Batches of one step, with all samples.
        prepare: Called before its steps.
        flops: FLOPs of a step, forward and backward, without padding.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    batches: Sequence[Any]
    prepare: Callable[[], None]
    flops: int

    @property
    def slots(self) -> int:
        """Number of tokens computed per step, including padding."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def step(self, recipe: Recipe, context: DistributedContext) -> float:
        """Run one step on all samples; return the loss."""
        supervised = num_supervised_tokens(self.batches)
        return optimizer_step(self.model, self.optimizer, self.batches, supervised, recipe, context).loss


def make_variants(
    names: Sequence[str], workload: Workload, recipe: Recipe, context: DistributedContext
) -> dict[str, Variant]:
    """Make the named variants; those of SOLO share one model and its optimizer."""
    images, documents = workload.draw()
    config = workload.config(SHAPE)
    lengths = [len(document) for document in documents]
    variants = {}
    if set(names) - {LLAVA}:
        model = random_model(SoloForConditionalGeneration, config, recipe, context)
        optimizer = make_optimizer(model, recipe.optimizer)
        packed = [collate(documents, sum(lengths), pad_token_id=0)]
        patches = sum(len(document.pixel_values) for document in documents)
        flops = training_flops(ModelShape.of(config), lengths, patches, num_supervised_tokens(packed))

        def use_sdpa() -> None:
            model.set_attn_implementation("sdpa")

        def use_packed() -> None:
            isolate_documents(model)

        rows = [_padded_batch(some) for some in in_batches(documents, workload.rows)]
        variants = {
            OURS: Variant(model, optimizer, packed, use_packed, flops),
            PADDED: Variant(FullLogits(model), optimizer, rows, use_sdpa, flops),
            FULL_LOGITS: Variant(FullLogits(model), optimizer, packed, use_packed, flops),
        }
    if LLAVA in names:
        llava = LlavaBaseline(config, TINY_CLIP if workload.tiny else CLIP_L, recipe, context)
        vision = np.array(config.vision_token_ids)
        batches = [
            llava.batch(*some, vision)
            for some in zip(
                in_batches(images, workload.rows), in_batches(documents, workload.rows), strict=True
            )
        ]
        lengths = [int(count) for batch in batches for count in batch["attention_mask"].sum(1)]
        variants[LLAVA] = Variant(
            llava,
            make_optimizer(llava.model, recipe.optimizer),
            batches,
            lambda: None,
            llava.flops(lengths, num_supervised_tokens(batches)),
        )
    return {name: variants[name] for name in names}


def _padded_batch(documents: Sequence[Document]) -> dict[str, Tensor]:
    rows = [(document.input_ids, document.labels) for document in documents]
    return {
        **padded(rows),
        "pixel_values": torch.from_numpy(np.concatenate([d.pixel_values for d in documents])),
        "image_grid_thw": torch.from_numpy(
            np.concatenate([document.image_grid_thw for document in documents])
        ),
    }
