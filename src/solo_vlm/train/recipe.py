"""Typed settings of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from solo_vlm.data.mixture import DataSettings, Mixture, SourceSettings, default_streams
from solo_vlm.data.sources import Source
from solo_vlm.evaluate.questions import DEFAULT_MAX_NEW_TOKENS, QuestionFiles
from solo_vlm.utils.settings import Settings

_MAX_BFLOAT16_BETA = 0.98


class OptimizerSettings(Settings):
    """Optimizer and its learning-rate schedule; the defaults are those of the paper's pre-training.

    Attributes:
        name: "adamw" keeps its moments in float32, "adamw_bf16" in bfloat16, "adamw_8bit" those of the
            matrices in decoder layers in 8 bits (needs torchao); "muon" (Jordan et al. 2024) orthogonalizes
            the updates of the linear layers in decoder layers, and trains everything else by AdamW.
        learning_rate: Peak learning rate, reached after warm-up.
        patch_learning_rate: Peak learning rate of the patch embedding (default: `learning_rate`). Small
            decoders need a smaller one. Its ratio to `learning_rate` is constant over the schedule.
        min_learning_rate: Learning rate at the end of the cosine decay; at most `learning_rate`.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Weight decay of matrices; norms and biases are not decayed.
        betas: Adam's betas.
        eps: Adam's epsilon.
        max_grad_norm: Gradient norm above which gradients are clipped.
    """

    name: Literal["adamw", "adamw_bf16", "adamw_8bit", "muon"] = "adamw"
    learning_rate: PositiveFloat = 5e-5
    patch_learning_rate: PositiveFloat | None = None
    min_learning_rate: float = Field(5e-6, ge=0)
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _check_rounding(self) -> Self:
        # A step changes the second moment by at least 1 - beta2 where gradients vanish; bfloat16 has 8 bits.
        if self.name == "adamw_bf16" and self.betas[1] > _MAX_BFLOAT16_BETA:
            raise PydanticCustomError(
                "beta_above_rounding",
                "betas = {betas}: bfloat16 moments would round off the steps of a second beta above "
                "{maximum}; lower it, or set name to adamw_8bit or adamw",
                {"betas": list(self.betas), "maximum": _MAX_BFLOAT16_BETA},
            )
        return self

    @model_validator(mode="after")
    def _check_minimum(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise PydanticCustomError(
                "minimum_above_peak",
                "min_learning_rate = {minimum} is above learning_rate = {peak}, so the rate would rise: set "
                "min_learning_rate to at most {peak}",
                {"minimum": f"{self.min_learning_rate:g}", "peak": f"{self.learning_rate:g}"},
            )
        return self


class CheckpointSettings(Settings):
    """Settings of checkpoints.

    Attributes:
        folder: Folder or URL (`s3://BUCKET/PATH`, or of another file system of fsspec) of this run's
            checkpoints; default: `checkpoints` in its output directory.
        save_interval: Steps between checkpoints.
        keep: Number of checkpoints to keep, newest first.
        asynchronous: Whether to write in the background, from a copy in main memory.
    """

    folder: str | None = Field(None, min_length=1)
    save_interval: PositiveInt = 500
    keep: PositiveInt = 2
    asynchronous: bool = True


class ParallelSettings(Settings):
    """Parallelism. Groups of `tensor` x `context` processes read different data and share parameters (FSDP).

    Attributes:
        tensor: Processes that split every layer; 2 in the paper.
        context: Processes that compute a slice of every packed sequence each.
        replicate: Copies of the parameters (HSDP), usually the number of machines: each is sharded within a
            machine, and gradients are summed over the copies once per step.
        defer_reduction: Sum the gradients of processes once per step, not after every packed sequence: less
            communication, and memory for whole gradients in float32.
        reshard: Free the gathered weights of a layer after its forward pass and gather them again for its
            backward pass: less memory, more communication.
    """

    tensor: PositiveInt = 1
    context: PositiveInt = 1
    replicate: PositiveInt = 1
    defer_reduction: bool = False
    reshard: bool = True


class TimeoutSettings(Settings):
    """Seconds that a process waits for the others before the run fails.

    Attributes:
        start: Until the first step is done, which loads the model and compiles it, and while a checkpoint or
            the model is saved.
        step: Between steps.
    """

    start: PositiveFloat = 1800
    step: PositiveFloat = 300


class ProfileSettings(Settings):
    """Steps to record with torch's profiler, as a Chrome trace per process in `out/profile`.

    Attributes:
        steps: First and last step, counted from 1. The first steps of a run are slower than the others.
    """

    steps: tuple[PositiveInt, PositiveInt]

    @property
    def first(self) -> int:
        """First step to record."""
        return self.steps[0]

    @property
    def last(self) -> int:
        """Last step to record."""
        return self.steps[1]

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.last < self.first:
            raise PydanticCustomError(
                "steps_reversed",
                "steps = {steps}: the last step comes before the first; swap them",
                {"steps": list(self.steps)},
            )
        return self


class LoraSettings(Settings):
    """LoRA (Hu et al. 2021) in place of full fine-tuning; the patch embedding stays fully trainable.

    Attributes:
        rank: Rank of the adapters.
        alpha: Scale of the adapters, applied as alpha / rank.
        dropout: Dropout probability of the adapters' inputs.
        targets: Names of the linear layers to adapt; default: all linear layers of the decoder.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class ValidationSettings(Settings):
    """Settings of the evaluation on held-out data while training: its loss, answers to questions, or both.

    Attributes:
        sources: Held-out sources for the loss, given as in `data.sources`.
        questions: Files of questions that the model answers, by name; a path alone is called "questions".
        interval: Steps between evaluations.
        sequences: Packed sequences for the loss, the same ones each time.
        samples: Questions per file, spread evenly over it, the same ones each time.
        max_new_tokens: Maximum length of an answer.
        best: Metric by which the best checkpoint is kept: "validation_loss", or "NAME/accuracy" of a file.
        patience: Evaluations in a row that do not improve `best`, after which the run ends early.
    """

    sources: list[SourceSettings] = Field(default_factory=list)
    questions: QuestionFiles = Field(default_factory=dict)
    interval: PositiveInt = 500
    sequences: PositiveInt = 64
    samples: PositiveInt = 64
    max_new_tokens: PositiveInt = DEFAULT_MAX_NEW_TOKENS
    best: str | None = None
    patience: PositiveInt | None = None

    @property
    def metrics(self) -> list[str]:
        """Metrics that `best` may name."""
        accuracies = [f"{name}/accuracy" for name in self.questions]
        return ["validation_loss", *accuracies] if self.sources else accuracies

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        if not self.metrics:
            raise PydanticCustomError("nothing_to_validate", "set sources, questions or both")
        if self.best is not None and self.best not in self.metrics:
            raise PydanticCustomError(
                "unknown_metric",
                "best = {best} is not measured: set it to {metrics}",
                {"best": self.best, "metrics": " or ".join(self.metrics)},
            )
        if self.patience is not None and self.best is None:
            raise PydanticCustomError(
                "patience_without_best",
                "patience needs the metric that has to improve: set best to {metrics}",
                {"metrics": " or ".join(self.metrics)},
            )
        return self


class Recipe(Settings):
    """One stage of training: a model, data, and how to train on them.

    Attributes:
        root: Folder that relative paths refer to.
        model: Folder or hub ID of the model to start from: a SOLO model, or a plain LLM to train on text.
        out: Output directory of the run; the trained model is saved as `out/model`.
        data: Sources and packing.
        steps: Optimizer steps; null: until the data ends (`data.epochs`), with an estimated number for the
            learning-rate schedule.
        global_batch: Packed sequences per step over all processes.
        precision: "bf16" computes in bfloat16 with float32 weights, "fp32" computes in float32.
        optimizer: Optimizer and learning-rate schedule.
        trainable: "all" parameters, the "patch_embedding" alone, or the "new_tokens" (the patch embedding
            and the rows of the vision tokens).
        lora: Train low-rank adapters instead of the decoder's weights.
        quantize: Keep the frozen decoder under the adapters in 4 bits ("nf4": QLoRA, Dettmers et al. 2023).
        activation_checkpointing: Activations recomputed in the backward pass: "none"; "selective", all but
            the results of matrix products and attention; "full", whole layers; "auto", in each layer the
            least for which the run fits into the device's memory by its plan.
        compile: Compile the decoder's layers with torch.compile.
        float8: Compute matrix products in float8, on hardware that supports it.
        router_aux_loss: Coefficient of the auxiliary loss that balances the load of experts. "auto": the
            model's own (`router_aux_loss_coef`); 0 if its routers are frozen, or if transformers has no such
            loss for its family.
        router_bias_update: Change per step of the biases by which routers choose experts, up for experts with
            less than an equal share of the step's tokens, down for those with more (0.001 in DeepSeek-V3);
            0: the biases stay.
        parallel: Parallelism of data, context and layers.
        validation: Evaluation on held-out data while training, if any.
        checkpoint: Checkpoint intervals and retention.
        timeouts: Timeouts of collectives.
        profile: Steps to record with torch's profiler, if any.
        log_interval: Steps between lines of metrics.
        trackers: Destinations of metrics in addition to `metrics.jsonl`.
        max_nonfinite: Consecutive steps that may be skipped for a non-finite loss or gradient.
        seed: Seed of everything random except the data order (`data.seed`).
    """

    root: str = "."
    model: str
    out: str
    data: DataSettings
    steps: PositiveInt | None = None
    global_batch: PositiveInt = 128
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: OptimizerSettings = OptimizerSettings()
    trainable: Literal["all", "patch_embedding", "new_tokens"] = "all"
    lora: LoraSettings | None = None
    quantize: Literal["nf4"] | None = None
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = "none"
    compile: bool = False
    float8: bool = False
    router_aux_loss: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    router_bias_update: float = Field(0.0, ge=0, allow_inf_nan=False)
    parallel: ParallelSettings = ParallelSettings()
    validation: ValidationSettings | None = None
    checkpoint: CheckpointSettings = CheckpointSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    profile: ProfileSettings | None = None
    log_interval: PositiveInt = 10
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    max_nonfinite: PositiveInt = 5
    seed: int = 0

    @model_validator(mode="after")
    def _check_routers(self) -> Self:
        if self.router_bias_update and self.is_decoder_frozen:
            raise PydanticCustomError(
                "frozen_routers",
                "router_bias_update = {update}: routers are not trained with {frozen}, and their biases stay "
                "with the frozen weights; set it to 0",
                {
                    "update": self.router_bias_update,
                    "frozen": "lora" if self.lora else f"trainable = {self.trainable}",
                },
            )
        return self

    @property
    def mixture(self) -> Mixture:
        """Training data, with the model that reads it."""
        data = self.data.model_copy(update={"streams": self.streams})
        return Mixture(root=self.root, model=self.model, data=data)

    @property
    def streams(self) -> int:
        """Number of virtual streams."""
        return self.data.streams or default_streams(self.global_batch)

    @property
    def validation_mixture(self) -> Mixture | None:
        """Held-out data as a single stream, so that it is the same for any number of processes."""
        if self.validation is None or not self.validation.sources:
            return None
        changes = {"sources": self.validation.sources, "epochs": 1, "streams": 1, "workers": 0}
        return self.mixture.model_copy(update={"data": self.data.model_copy(update=changes)})

    def open_questions(self) -> dict[str, Source]:
        """Open the files of validation questions, by name."""
        files = self.validation.questions if self.validation else {}
        mixture = self.mixture
        return {name: file.open(mixture.limits, mixture.source_path) for name, file in files.items()}

    @property
    def output_dir(self) -> Path:
        """Output directory of the run."""
        return self.mixture.at(self.out)

    @property
    def is_decoder_frozen(self) -> bool:
        """Whether the decoder's weights need no gradients."""
        return self.lora is not None or self.trainable != "all"
