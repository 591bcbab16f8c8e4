"""A training run as typed settings: read from YAML, with inheritance and `key=value` overrides."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from solo_vlm.data.mixture import DataSettings, Mixture, SourceSettings
from solo_vlm.settings import Settings


class OptimizerSettings(Settings):
    """AdamW and its schedule. Defaults: the paper's pre-training.

    Attributes:
        learning_rate: peak, after the warm-up.
        patch_learning_rate: peak of the patch embedding, where it shall differ (small decoders need less).
        min_learning_rate: at the end of the cosine.
        warmup_steps: of linear growth.
        weight_decay: of matrices; norms and biases are not decayed.
        betas: of Adam.
        eps: of Adam.
        max_grad_norm: the gradient is clipped to.
    """

    learning_rate: PositiveFloat = 5e-5
    patch_learning_rate: PositiveFloat | None = None
    min_learning_rate: float = Field(5e-6, ge=0)
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0


class CheckpointSettings(Settings):
    """How often the run is saved and how many of the newest checkpoints stay."""

    every: PositiveInt = 500
    keep: PositiveInt = 2


class Recipe(Mixture):
    """One stage of training.

    Attributes:
        root: folder that the relative paths of the recipe count from.
        model: folder of the model to start from: a SOLO model, or a plain LLM to train on text alone.
        out: folder of the run; the trained model will be `out/model`.
        steps: optimizer steps.
        global_batch: packed sequences a step, over all processes.
        precision: "bf16" computes in bfloat16 over float32 weights, "fp32" in float32.
        gradient_checkpointing: recompute activations in the backward pass.
        log_every: steps between two lines of metrics.
        seed: of everything that is random outside of the data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str
    steps: PositiveInt
    global_batch: PositiveInt = 128
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    log_every: PositiveInt = 10
    seed: int = 0
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()


__all__ = ["CheckpointSettings", "DataSettings", "OptimizerSettings", "Recipe", "SourceSettings"]
