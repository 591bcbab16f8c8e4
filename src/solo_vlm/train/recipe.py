"""A training run as typed settings: read from YAML, with inheritance and `key=value` overrides."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from solo_vlm.data.mixture import DataSettings, Mixture, SourceSettings
from solo_vlm.utils.settings import Settings


class OptimizerSettings(Settings):
    """AdamW and its schedule. Defaults: the paper's pre-training.

    Attributes:
        learning_rate: peak, after the warm-up.
        patch_learning_rate: peak of the patch embedding, where it shall differ (small decoders need less);
            its rate stays in this proportion to that of the others, also at the end.
        min_learning_rate: at the end of the cosine; at most `learning_rate`.
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

    @model_validator(mode="after")
    def _check_floor(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise PydanticCustomError(
                "floor_above_peak",
                "min_learning_rate = {floor} is above learning_rate = {peak}, so the rate would rise: set "
                "min_learning_rate to at most that",
                {"floor": f"{self.min_learning_rate:g}", "peak": f"{self.learning_rate:g}"},
            )
        return self


class CheckpointSettings(Settings):
    """How the run is saved.

    Attributes:
        every: steps between two checkpoints.
        keep: how many of the newest stay.
        asynchronous: write while training goes on; what is written is copied to memory first.
    """

    every: PositiveInt = 500
    keep: PositiveInt = 2
    asynchronous: bool = True


class ParallelSettings(Settings):
    """How processes share the work: `tensor` of them split every layer, all groups of those split the data.

    Attributes:
        tensor: processes that each layer is split over; 2 in the paper.
        reshard: free a layer's gathered weights after its forward pass and gather them again for the
            backward pass: less memory, more communication.
    """

    tensor: PositiveInt = 1
    reshard: bool = True


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021) in place of full fine-tuning; the patch embedding is trained whole.

    Attributes:
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        dropout: on their inputs.
        targets: names of the linear layers they go to; default: all of the decoder's.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class ValidationSettings(Settings):
    """Loss on data that are held out.

    Attributes:
        sources: as of the training data.
        every: steps between two measurements.
        sequences: packed sequences measured, the same ones each time.
    """

    sources: list[SourceSettings] = Field(min_length=1)
    every: PositiveInt = 500
    sequences: PositiveInt = 64


class Recipe(Mixture):
    """One stage of training.

    Attributes:
        root: folder that the relative paths of the recipe count from.
        model: folder of the model to start from: a SOLO model, or a plain LLM to train on text alone.
        out: folder of the run; the trained model will be `out/model`.
        steps: optimizer steps; none: until the data end (`data.epochs`), their number estimated for the
            schedule of the learning rate.
        global_batch: packed sequences a step, over all processes.
        precision: "bf16" computes in bfloat16 over float32 weights, "fp32" in float32.
        activation_checkpointing: what the backward pass computes again instead of keeping it: "none";
            "selective", all but the results of matrix products and attention; "full", every layer.
        compile: compile the decoder's layers with torch.compile.
        float8: matrix products in float8, where the hardware has it.
        trainable: "all" parameters, the "patch_embedding" alone, or the "new_tokens" (the patch embedding
            and the rows of SOLO's own tokens).
        lora: train low-rank adapters instead of the decoder's weights.
        quantize: hold the frozen decoder under the adapters in 4 bits ("nf4": QLoRA, Dettmers et al. 2023).
        parallel: how processes share the work.
        log_every: steps between two lines of metrics.
        trackers: where metrics go besides `metrics.jsonl`.
        validation: held-out data, if any.
        max_nonfinite: steps in a row that may be skipped for a loss or gradient that is not finite.
        seed: of everything that is random outside of the data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str
    steps: PositiveInt | None = None
    global_batch: PositiveInt = 128
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    float8: bool = False
    trainable: Literal["all", "patch_embedding", "new_tokens"] = "all"
    lora: LoraSettings | None = None
    quantize: Literal["nf4"] | None = None
    parallel: ParallelSettings = ParallelSettings()
    log_every: PositiveInt = 10
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    validation: ValidationSettings | None = None
    max_nonfinite: PositiveInt = 5
    seed: int = 0
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()


__all__ = [
    "CheckpointSettings",
    "DataSettings",
    "LoraSettings",
    "OptimizerSettings",
    "ParallelSettings",
    "Recipe",
    "SourceSettings",
    "ValidationSettings",
]
