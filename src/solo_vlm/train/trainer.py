"""The training loop; `Trainer.train_step` is one step from top to bottom."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, set_seed

from solo_vlm.data.collate import PackedBatch, model_inputs, num_supervised_tokens
from solo_vlm.data.loader import LoadedSequence, PackedLoader
from solo_vlm.data.mixture import make_loader
from solo_vlm.models.flops import ModelShape, training_flops
from solo_vlm.train.checkpoint import (
    Checkpointer,
    TrainState,
    export_model,
    load_checkpoint,
    load_train_state,
    warn_if_disk_is_short,
)
from solo_vlm.train.estimate.memory import recognize_device
from solo_vlm.train.estimate.plan import planned_steps
from solo_vlm.train.experts import ExpertRouting, Routed
from solo_vlm.train.failures import Stopped, StopRequest, catch_signals
from solo_vlm.train.metrics import (
    MetricsLogger,
    first_start,
    make_trackers,
    memory_gb,
    progress_bar,
    slowest_process,
)
from solo_vlm.train.model import make_model
from solo_vlm.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from solo_vlm.train.parallel.context import DistributedContext, init_distributed
from solo_vlm.train.parallel.sharding import average_replicated_gradients, reshard
from solo_vlm.train.profile import StepProfiler
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import prepare_output_dir, write_manifest
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import lock_output_dir, write_text, writing

logger = logging.getLogger(__name__)

_LEFT_OUT = ("skipped", "filtered")  # counts that are logged as metrics

_COUNTED = ("documents", "tokens", "vision", "supervised", "flops")
_MAX_SAMPLES_LISTED = 20  # in the message about a non-finite loss
_SAVE_TIMEOUT = 20.0  # seconds to finish a pending checkpoint after a failure; all processes exit in a minute


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`.

    Attributes:
        model: Folder of the trained model.
        metrics: Summary of the run: steps, tokens, seconds, counts of samples by skip reason.
    """

    model: Path
    metrics: dict[str, Any]


def train(recipe: Recipe, resume: bool = False, progress: Progress | None = None) -> TrainResult:
    """Train a recipe to its end, with all processes that torchrun has started.

    An interrupted run resumes from its newest checkpoint when it is started again with the same recipe, on
    any number of processes. On CPU with the same number of processes, its losses equal those of an
    uninterrupted run bit for bit.

    Args:
        resume: Fail unless there is a checkpoint to resume from.
        progress: Progress display; default: a new one on stderr.

    Raises:
        SoloError: Model or data cannot be read, the output directory belongs to another run, there is nothing
            to resume, the recipe cannot be divided among the processes, or losses are no longer finite.
        Stopped: SIGTERM, SIGINT or SIGHUP was received, and the run is saved.
    """
    stop = StopRequest()
    with (
        init_distributed(recipe, stop) as context,
        catch_signals(stop),
        nullcontext(progress) if progress else progress_bar(quiet=not context.is_main_process) as shown,
        writing(recipe.output_dir),
    ):
        return Trainer(recipe, resume, context, shown, stop).run()


class Trainer:
    """State of a run in one process."""

    def __init__(
        self, recipe: Recipe, resume: bool, context: DistributedContext, progress: Progress, stop: StopRequest
    ) -> None:
        self.recipe, self.context, self.stop = recipe, context, stop
        self.out = recipe.output_dir
        context.check_same_settings(recipe)
        self.sources = recipe.mixture.open_sources()
        context.check_same_data(self.sources)
        self._lock: IO[str] | None = None
        checkpoint = context.broadcast_from_rank0(lambda: self._prepare_output_dir(resume))
        self.started = first_start(self.out) if context.is_main_process else 0.0

        set_seed(recipe.seed)
        self.model, self.processor = make_model(recipe, context)
        self.experts = ExpertRouting.of(self.model, recipe.router_aux_loss)
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        dp = context.dims.dp
        self.loader = make_loader(recipe.mixture, self.processor, self.sources, context.dp_rank, dp)
        if checkpoint:
            load_checkpoint(checkpoint, self.model, self.optimizer)
            self.state = context.broadcast_from_rank0(lambda: load_train_state(checkpoint))
            self.loader.load_state_dict(self.state.data or {})
            logger.info("resuming from %s", checkpoint)
        else:
            total_steps = recipe.steps or context.broadcast_from_rank0(lambda: planned_steps(recipe))
            self.state = TrainState(total_steps=total_steps)
        self.consecutive_skips = 0

        settings = recipe.checkpoint
        folder = self.out / "checkpoints"
        self.checkpointer = Checkpointer(folder, settings.keep, settings.asynchronous, context)
        if context.is_main_process:
            warn_if_disk_is_short(self.out, self.model, self.optimizer, settings.keep)
        self.validator = Validator(recipe, self.processor, context) if recipe.validation else None
        try:
            self.shape: ModelShape | None = ModelShape.of(self.model.config)
        except SoloError as error:
            logger.warning("metrics will have no FLOPs: %s", error)
            self.shape = None
        device = recognize_device(torch.cuda.get_device_name()) if context.device.type == "cuda" else None
        self.peak_flops = device.peak_flops * context.dims.world_size if device else None
        self.profiler = StepProfiler(recipe.profile, self.out, context.rank)
        self.metrics_logger = None
        if context.is_main_process:
            trackers = make_trackers(recipe, self.out, self.state.step)
            self.metrics_logger = MetricsLogger(
                self.out, trackers, progress, self.state.total_steps, self.state.step
            )

    def run(self) -> TrainResult:
        """Run all steps, export the model and write the manifest."""
        started, tokens_before, first_step = time.perf_counter(), self.state.tokens, self.state.step + 1
        try:
            while self.state.step < (self.recipe.steps or sys.maxsize) and self.train_step():
                if self.state.step == first_step:  # which may have compiled the model
                    self.context.set_timeout(self.recipe.timeouts.step)
            self._finish_saving()
        except BaseException:
            self.loader.close()
            with suppress(Exception):
                self.profiler.close()
            # A failing process still completes its part of a checkpoint that all processes are writing.
            with suppress(Exception), self.stop.uninterrupted():
                self.checkpointer.wait(_SAVE_TIMEOUT)
            with suppress(Exception):
                self._close_logger()
            raise
        self.loader.close()
        self.profiler.close()
        self._close_logger()
        self.context.set_timeout(self.recipe.timeouts.start)
        seconds = time.perf_counter() - started
        summary = {
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "seconds": seconds,
            "tokens_per_second": (self.state.tokens - tokens_before) / seconds,
            "skipped_steps": self.state.skipped_steps,
            "data": self._sample_counts(),
            "parallel": {"world_size": self.context.dims.world_size, **asdict(self.context.dims)},
        }
        skipped = list(chain.from_iterable(self.context.gather(self.loader.skipped())))
        # The model comes last, because it marks a finished run.
        if self.context.is_main_process:
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
            write_text(self.out / "skipped.jsonl", "".join(lines))
            write_manifest(self.out / "manifest.json", self.recipe, self.sources, summary)
        model = export_model(self.out, self.model, self.processor, self.recipe, self.context)
        return TrainResult(model, summary)

    def train_step(self) -> bool:
        """Run one optimizer step; return False if the data has ended before it."""
        recipe, context, state = self.recipe, self.context, self.state
        self.profiler.before_step(state.step + 1)

        # This rank's packed sequences of the global batch, and token counts over all ranks.
        started = time.perf_counter()
        sequences, counts = self._read_global_batch()
        data_wait = time.perf_counter() - started
        if not sequences:
            if not state.step:
                raise SoloError("no row of the data can be used: see solo data verify")
            if recipe.steps:
                logger.warning("the data ended after %d of %d steps", state.step, recipe.steps)
            return False
        batches = [sequence.batch if sequence else self.loader.empty_batch() for sequence in sequences]

        # Reseed from (seed, step, dp_rank), so checkpoints need no RNG state.
        entropy = (recipe.seed, state.step, context.dp_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        rate = learning_rate(state.step, state.total_steps, recipe.optimizer)
        set_learning_rate(self.optimizer, rate)
        if self.experts:
            tokens = [sequence.tokens if sequence else 0 for sequence in sequences]
            self.experts.start_step(tokens, counts["tokens"])
        result = optimizer_step(
            self.model, self.optimizer, batches, counts["supervised"], recipe, context, self.experts
        )

        capacity = recipe.global_batch * recipe.data.sequence_length
        state.step += 1
        state.tokens += capacity
        self.consecutive_skips = 0 if result.is_finite else self.consecutive_skips + 1
        if not result.is_finite:
            self._skip_step(result, sequences)

        self.profiler.after_step(state.step)
        seconds = time.perf_counter() - started
        state.productive_seconds += seconds - data_wait
        metrics = {
            "loss": result.loss,
            "learning_rate": rate,
            "gradient_norm": result.gradient_norm,
            "skipped_steps": state.skipped_steps,
            "tokens_per_second": counts["tokens"] / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": data_wait,
            "supervised_tokens": counts["supervised"],
            "vision_tokens": counts["vision"],
            "text_tokens": counts["tokens"] - counts["vision"],
            "documents": counts["documents"],
            "fill": counts["tokens"] / capacity,
            "memory_gb": memory_gb(context.device),
        }
        if self.shape:
            metrics["flops"] = counts["flops"]
        if self.shape and self.peak_flops:
            metrics["mfu"] = counts["flops"] / seconds / self.peak_flops

        is_last = state.step == recipe.steps
        if self.validator and recipe.validation and (is_last or state.step % recipe.validation.interval == 0):
            metrics["validation_loss"] = self.validator.loss(self.model)
        is_logged = state.step == 1 or is_last or state.step % recipe.log_interval == 0
        if is_logged or "validation_loss" in metrics:
            if self.experts:
                metrics.update(self.experts.metrics(context))
            left_out = {n: c for n, c in self._sample_counts().items() if n.startswith(_LEFT_OUT)}
            metrics.update(slowest_process(context))
            if self.metrics_logger:
                metrics["goodput"] = state.productive_seconds / (time.time() - self.started)
                self.metrics_logger.log(state.step, {**metrics, **left_out})
        if self.metrics_logger:
            self.metrics_logger.advance(state.step)
        if state.step % recipe.checkpoint.save_interval == 0 and not is_last:
            self._save()
        self.checkpointer.raise_errors()
        self._stop_if_requested()
        return True

    def _read_global_batch(self) -> tuple[list[LoadedSequence | None], Counter[str]]:
        """Read this rank's part of the next global batch and count it over all ranks.

        Returns:
            Equally many sequences on all ranks, padded with None at the end of the data, and totals over all
            ranks of documents, tokens, vision and supervised tokens, and FLOPs.
        """
        dp, totals = self.context.dims.dp, Counter[str]()

        def add_up(sequences: Sequence[LoadedSequence], is_ended: bool) -> tuple[list[int], bool]:
            counted = sum(map(self._count, sequences), Counter[str]())
            per_rank = [len(sequences) * (rank == self.context.dp_rank) for rank in range(dp)]
            values = [counted[name] for name in _COUNTED]
            *sums, num_ended = map(int, self.context.sum(*per_rank, *values, is_ended))
            totals.update(dict(zip(_COUNTED, sums[dp:], strict=True)))
            return sums[:dp], num_ended == dp

        return self.loader.take_together(self.recipe.global_batch, add_up), totals

    def _count(self, sequence: LoadedSequence) -> Counter[str]:
        supervised, flops = sequence.supervised_tokens, 0
        if self.shape is not None:
            lengths, patches = sequence.document_lengths, len(sequence.batch["pixel_values"])
            is_frozen = self.recipe.is_decoder_frozen
            flops = training_flops(self.shape, lengths, patches, supervised, frozen=is_frozen)
        return Counter(
            documents=sequence.documents,
            tokens=sequence.tokens,
            vision=sequence.vision_tokens,
            supervised=supervised,
            flops=flops,
        )

    def _skip_step(self, result: StepResult, sequences: Sequence[LoadedSequence | None]) -> None:
        """Count and report a step without update; raise after too many in a row."""
        self.state.skipped_steps += 1
        samples = [self.loader.names(sequence) if sequence else [] for sequence in sequences]
        is_bad = [not math.isfinite(loss) for loss in result.losses]
        bad = [name for names, flag in zip(samples, is_bad, strict=True) if flag for name in names]
        # If all losses are finite, the gradient is not, and any sample may be the cause.
        named = list(chain.from_iterable(self.context.gather(bad))) or list(
            chain.from_iterable(self.context.gather(list(chain.from_iterable(samples))))
        )
        what = f"step {self.state.step}: loss {result.loss:g}, gradient norm {result.gradient_norm:g}"
        listed = "".join(f"\n  {name}" for name in named[:_MAX_SAMPLES_LISTED])
        if self.consecutive_skips >= self.recipe.max_nonfinite:
            raise SoloError(
                f"{what}; {self.consecutive_skips} steps in a row were not finite. Check these samples, or "
                f"lower the rate:{listed}"
            )
        logger.warning("%s; skipping the step. Its samples:%s", what, listed)

    def _save(self) -> None:
        self.state.data = PackedLoader.merge(self.context.gather(self.loader.state_dict()))
        with self.stop.uninterrupted(), self.context.long_timeout():
            self.checkpointer.save(self.model, self.optimizer, self.state)

    def _finish_saving(self) -> None:
        with self.stop.uninterrupted(), self.context.long_timeout():
            self.checkpointer.wait()

    def _stop_if_requested(self) -> None:
        number = self.context.max(self.stop.signal)  # any process may have received it
        if not number or self.state.step == self.recipe.steps:
            return
        with self.stop.uninterrupted():
            self._save()
            self._finish_saving()
        raise Stopped(
            f"stopped by {signal.Signals(number).name}, saved after step {self.state.step}: "
            "run the same command to resume",
            number,
        )

    def _prepare_output_dir(self, resume: bool) -> Path | None:
        if resume and not self.out.is_dir():
            raise SoloError(f"nothing to resume: {self.out} has no checkpoint")
        self._lock = lock_output_dir(self.out)
        return prepare_output_dir(self.out, self.recipe, resume)

    def _sample_counts(self) -> dict[str, int]:
        """Return counts over all ranks: sequences, documents, tokens, samples, skipped samples by reason."""
        return dict(sum(map(Counter, self.context.gather(self.loader.counts())), Counter()))

    def _close_logger(self) -> None:
        if self.metrics_logger:
            self.metrics_logger.close()


class Validator:
    """Mean loss over the supervised tokens of held-out sequences, packed like the training data.

    The sequences are the same for any number of processes; each process reads all and evaluates its part.
    """

    def __init__(self, recipe: Recipe, processor: Any, context: DistributedContext) -> None:
        assert recipe.validation is not None and recipe.validation_mixture is not None
        self._recipe, self._mixture, self._context = recipe, recipe.validation_mixture, context
        self._sequences = recipe.validation.sequences
        self._processor = processor
        self._sources = self._mixture.open_sources()
        context.check_same_data(self._sources)

    @torch.no_grad()
    def loss(self, model: PreTrainedModel) -> float:
        """Return the mean loss; leaves the model in training mode."""
        loader = make_loader(self._mixture, self._processor, self._sources)
        sequences = islice(loader, self._sequences)
        dp, dp_rank = self._context.dims.dp, self._context.dp_rank
        model.eval()
        total = supervised = 0.0
        # All processes take part in every round, because a sharded model gathers its weights in each.
        while self._context.max(len(batches := list(islice(sequences, dp)))):
            batch = batches[dp_rank] if dp_rank < len(batches) else loader.empty_batch()
            with autocast(self._recipe, self._context):
                inputs = model_inputs(model, batch)
                total += model(**inputs, use_cache=False, num_items_in_batch=1, logits_to_keep=1).loss.item()
            supervised += num_supervised_tokens([batch])
        model.train()
        reshard(model)
        total, supervised = self._context.sum(total, supervised)
        return total / max(supervised, 1)


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step.

    Attributes:
        loss: Mean cross entropy over all supervised tokens of the global batch.
        gradient_norm: Global gradient norm before clipping.
        is_finite: Whether both are finite; otherwise the weights were not updated.
        losses: Contributions of this process's sequences to `loss`.
    """

    loss: float
    gradient_norm: float
    is_finite: bool
    losses: list[float]


def optimizer_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    supervised: int,
    recipe: Recipe,
    context: DistributedContext,
    experts: ExpertRouting | None = None,
) -> StepResult:
    """Run one optimizer step on the token-averaged loss; skip the update if loss or gradient is not finite.

    Args:
        optimizer: Optimizer of its trainable parameters, with the learning rate set.
        batches: This process's packed sequences of the global batch; each gets a forward and backward pass.
        supervised: Supervised tokens of the global batch over all processes.
        experts: Routing of a mixture of experts, with this step started.
    """
    losses = forward_backward(model, batches, supervised, autocast(recipe, context), experts)
    (loss,) = context.sum(sum(losses))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if context.mesh is not None and context.dims.tp > 1:
        average_replicated_gradients(parameters, context.mesh)
    norm = clip_gradients(parameters, recipe.optimizer.max_grad_norm)
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    if is_finite:
        optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss, norm, is_finite, losses)


def forward_backward(
    model: PreTrainedModel,
    batches: Sequence[PackedBatch],
    supervised: int,
    precision: AbstractContextManager[Any],
    experts: ExpertRouting | None = None,
) -> list[float]:
    """Accumulate gradients; return each batch's summed cross entropy divided by `supervised`."""
    losses = []
    for row, batch in enumerate(batches):
        recording: AbstractContextManager[list[Routed]] = experts.recording() if experts else nullcontext([])
        with precision, recording as routed:
            inputs = model_inputs(model, batch)
            loss = model(**inputs, use_cache=False, num_items_in_batch=max(supervised, 1)).loss
        penalty = experts.add_row(row, routed) if experts else 0.0
        (loss + penalty).backward()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Clip the global gradient norm over all meshes; return the norm before clipping."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = []
    for group in by_mesh.values():
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm.item()


def autocast(recipe: Recipe, context: DistributedContext) -> AbstractContextManager[Any]:
    """Return the autocast context of a run; FSDP casts the weights of a sharded model itself."""
    is_sharded = context.mesh is not None and not recipe.quantize
    if recipe.precision == "fp32" or is_sharded:
        return nullcontext()
    return torch.autocast(context.device.type, dtype=torch.bfloat16)
