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
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, set_seed

from solo_vlm.data.collate import PackedBatch, model_inputs
from solo_vlm.data.loader import LoadedSequence, PackedLoader
from solo_vlm.data.mixture import make_loader
from solo_vlm.data.sources import Source
from solo_vlm.data.workers import worker_errors
from solo_vlm.models.flops import training_flops
from solo_vlm.train.activation_checkpointing import prepare_layers
from solo_vlm.train.answers import AnswerLog
from solo_vlm.train.balance import Balancer
from solo_vlm.train.checkpoint import (
    Checkpointer,
    TrainState,
    export_model,
    load_checkpoint,
    load_train_state,
    warn_if_disk_is_short,
)
from solo_vlm.train.estimate.layout import Layout
from solo_vlm.train.estimate.memory import describe_modes, device_memory, plan_layout, recognize_device
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
from solo_vlm.train.model import autocast, make_model
from solo_vlm.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from solo_vlm.train.parallel.context import DistributedContext, init_distributed
from solo_vlm.train.parallel.sharding import average_replicated_gradients, reduce_gradients
from solo_vlm.train.profile import StepProfiler
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import prepare_output_dir, read_outcome, run_folders, write_manifest
from solo_vlm.train.storage import CheckpointStore, Folder
from solo_vlm.train.validation import Validation
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
    any number of processes; a finished one returns its result at once. On CPU with the same number of
    processes, losses of a resumed run equal those of an uninterrupted one bit for bit.

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
        worker_errors(),
    ):
        outcome = context.broadcast_from_rank0(lambda: read_outcome(recipe))
        if outcome:
            return TrainResult(recipe.output_dir / "model", outcome)
        return Trainer(recipe, resume, context, shown, stop).run()


class Trainer:
    """State of a run in one process."""

    def __init__(
        self, recipe: Recipe, resume: bool, context: DistributedContext, progress: Progress, stop: StopRequest
    ) -> None:
        self.recipe, self.context, self.stop = recipe, context, stop
        self.out = recipe.output_dir
        context.check_same_settings(recipe)
        self.store = CheckpointStore.of(recipe, self.out)
        self.store.check_access(context.rank)
        self.sources = context.open_sources(recipe.mixture)
        mixture = recipe.validation_mixture
        held_out = context.open_sources(mixture) if mixture else []
        self._lock: IO[str] | None = None
        checkpoint = context.broadcast_from_rank0(lambda: self._prepare_output_dir(held_out, resume))
        self.started = first_start(run_folders(self.out, self.store)) if context.is_main_process else 0.0

        set_seed(recipe.seed)
        self.model, self.processor = make_model(recipe, context)
        memory = device_memory(context)
        layout = context.broadcast_from_rank0(lambda: self._plan_layout(memory))
        self.shape = layout.shape if layout else None
        modes = layout.modes if layout else recipe.activation_checkpointing
        assert modes != "auto"  # without a layout there is none
        self.modes = prepare_layers(self.model, modes, recipe.compile, is_split=context.dims.tp > 1)
        self.experts = ExpertRouting.of(
            self.model, recipe.router_aux_loss, context.slices, recipe.router_bias_update
        )
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        dp = context.dims.dp
        self.loader = make_loader(recipe.mixture, self.processor, self.sources, context.dp_rank, dp)
        if checkpoint:
            load_checkpoint(checkpoint, self.model, self.optimizer)
            self.state = context.broadcast_from_rank0(lambda: load_train_state(checkpoint))
            self.loader.load_state_dict(self.state.data or {})
        else:
            planned = context.broadcast_from_rank0(lambda: planned_steps(recipe, self.sources))
            self.state = TrainState(total_steps=planned)
        self.consecutive_skips = 0

        settings = recipe.checkpoint
        self.checkpointer = Checkpointer(self.store, settings.keep, settings.asynchronous, context)
        if context.is_main_process and not self.store.is_separate:
            kept = settings.keep + bool(recipe.validation and recipe.validation.best)
            warn_if_disk_is_short(self.out, self.model, self.optimizer, kept)
        self.validation: Validation | None = None
        if recipe.validation:
            self.validation = Validation(recipe, held_out, self.model, self.processor, context)
        self.balancer: Balancer | None = None
        if self.shape and context.dims.dp > 1 and context.dims.gradient_accumulation_steps > 1:
            self.balancer = Balancer(self.shape, self.modes.recomputed, context)
        device = recognize_device(torch.cuda.get_device_name()) if context.device.type == "cuda" else None
        self.peak_flops = device.peak_flops * context.dims.world_size if device else None
        self.profiler = StepProfiler(recipe.profile, self.out, context.rank)
        self.metrics_logger = self.answer_log = None
        if context.is_main_process:
            trackers, done = make_trackers(recipe, self.out, self.state.step), self.state.step
            self.metrics_logger = MetricsLogger(self.out, trackers, progress, self.state.total_steps, done)
            if checkpoint:
                self.metrics_logger.announce(f"resuming from {checkpoint}")
            if layout and recipe.activation_checkpointing == "auto":
                self.metrics_logger.announce(describe_modes(layout, recipe, memory))
            if recipe.validation and recipe.validation.questions:
                self.answer_log = AnswerLog(self.out, trackers, done)

    def run(self) -> TrainResult:
        """Run all steps, export the model and write the manifest."""
        started, tokens_before, first_step = time.perf_counter(), self.state.tokens, self.state.step + 1
        try:
            while not self._is_finished and self.train_step():
                if self.state.step == first_step:  # which may have compiled the model
                    self.context.set_timeout(self.recipe.timeouts.step)
            self._save_last()
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
            "best": asdict(self.state.best) if self.state.best else None,
            "stopped": self.state.stopped,
            "data": self._sample_counts(),
            "parallel": {"world_size": self.context.dims.world_size, **asdict(self.context.dims)},
            "activation_checkpointing": asdict(self.modes),
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
            if self.validation and not self._validates():
                self._log(self._validate())
                self._save_best()
            state.is_data_used = True
            return False
        if self.balancer:
            sequences = self.balancer(sequences)
        batches = [sequence.batch if sequence else self.loader.empty_batch() for sequence in sequences]

        # Reseed from (seed, step, rank), so checkpoints need no RNG state.
        entropy = (recipe.seed, state.step, context.dp_rank, context.cp_rank)
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
        is_logged = state.step == 1 or is_last or state.step % recipe.log_interval == 0
        if self.validation and (is_last or self._validates()):
            metrics |= self._validate()
            is_logged = True
        if is_logged:
            if self.experts:
                metrics.update(self.experts.metrics(context))
            metrics.update(slowest_process(context))
            since_start = max(time.time() - self.started, state.productive_seconds)  # a clock may be set back
            metrics["goodput"] = state.productive_seconds / since_start
            self._log(metrics)
        if self.metrics_logger:
            self.metrics_logger.advance(state.step)
        if state.step % recipe.checkpoint.save_interval == 0 and not is_last:
            self._save()
        self._save_best()
        self.checkpointer.raise_errors()
        self._stop_if_requested()
        return True

    @property
    def _is_finished(self) -> bool:
        is_last = self.state.step >= (self.recipe.steps or sys.maxsize)
        return is_last or self.state.is_data_used or bool(self.state.stopped)

    def _validates(self) -> bool:
        """Return whether the current step is one of those evaluated on held-out data."""
        settings = self.recipe.validation
        return settings is not None and self.state.step % settings.interval == 0

    def _validate(self) -> dict[str, float]:
        """Evaluate on held-out data, and log the answers; return the metrics."""
        assert self.validation is not None
        result = self.validation.evaluate(self.model, self.state)
        if self.metrics_logger:
            self.metrics_logger.announce(result.describe(self.state))
        if self.answer_log:
            self.answer_log.log(self.state.step, result.answers)
        return result.metrics

    def _log(self, metrics: dict[str, float]) -> None:
        left_out = {n: c for n, c in self._sample_counts().items() if n.startswith(_LEFT_OUT)}
        if self.metrics_logger:
            self.metrics_logger.log(self.state.step, {**metrics, **left_out})

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

    def _save_best(self) -> None:
        if self.state.best and self.state.best.step == self.state.step:
            self._save()

    def _save_last(self) -> None:
        """Save the last step where a kill during the export would cost more than that.

        That is so for a run that saves at all, and for one that was told to stop: its grace period may end.
        """
        is_long = self.state.step >= self.recipe.checkpoint.save_interval
        # Checkpoints in a folder of their own may outlive the exported model.
        if self.context.max(self.stop.signal) or is_long or self.store.is_separate:
            self._save()

    def _finish_saving(self) -> None:
        with self.stop.uninterrupted(), self.context.long_timeout():
            self.checkpointer.wait()

    def _stop_if_requested(self) -> None:
        number = self.context.max(self.stop.signal)  # any process may have received it
        if not number or self._is_finished:
            return
        with self.stop.uninterrupted():
            self._save()
            self._finish_saving()
        raise Stopped(
            f"stopped by {signal.Signals(number).name}, saved after step {self.state.step}: "
            "run the same command to resume",
            number,
        )

    def _prepare_output_dir(self, held_out: list[Source], resume: bool) -> Folder | None:
        if resume and not self.out.is_dir() and not self.store.newest():
            raise SoloError(f"nothing to resume: {self.store.folder} has no checkpoint")
        self._lock = lock_output_dir(self.out)
        return prepare_output_dir(self.out, self.recipe, held_out, resume, self.store)

    def _plan_layout(self, memory: int | None) -> Layout | None:
        """Count the model, and choose its activation checkpointing; None if it cannot be counted."""
        recipe = self.recipe
        try:
            return plan_layout(self.model.config, recipe, self.context.dims, memory)
        except SoloError as error:
            if recipe.activation_checkpointing == "auto":
                raise
            logger.warning("metrics will have no FLOPs: %s", error)
            return None

    def _sample_counts(self) -> dict[str, int]:
        """Return counts over all ranks: sequences, documents, tokens, samples, skipped samples by reason."""
        return dict(sum(map(Counter, self.context.gather(self.loader.counts())), Counter()))

    def _close_logger(self) -> None:
        if self.metrics_logger:
            self.metrics_logger.close()


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step.

    Attributes:
        loss: Mean cross entropy over all supervised tokens of the global batch.
        gradient_norm: Global gradient norm before clipping.
        is_finite: Whether both are finite; otherwise the weights were not updated.
        losses: Contributions of this process's sequences, all slices of them, to `loss`.
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
    part, is_deferred = (context.cp_rank, context.dims.cp), recipe.parallel.defer_reduction
    losses = forward_backward(
        model, batches, supervised, autocast(recipe, context), experts, part, is_deferred
    )
    losses = context.sum_slices(*losses)
    (loss,) = context.sum(sum(losses))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if context.mesh is not None and context.dims.tp > 1:
        average_replicated_gradients(parameters, context.mesh)
    norm = clip_gradients(parameters, recipe.optimizer.max_grad_norm)
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    if is_finite:
        optimizer.step()
        if experts:
            experts.update_biases(context)
    optimizer.zero_grad()
    return StepResult(loss, norm, is_finite, losses)


def forward_backward(
    model: PreTrainedModel,
    batches: Sequence[PackedBatch],
    supervised: int,
    precision: AbstractContextManager[Any],
    experts: ExpertRouting | None = None,
    part: tuple[int, int] = (0, 1),
    is_deferred: bool = False,
) -> list[float]:
    """Accumulate gradients; return each batch's summed cross entropy divided by `supervised`.

    Args:
        part: Index of this process's slice of each packed sequence, and the number of slices.
        is_deferred: See `reduce_gradients`.
    """
    losses = []
    for row, batch in enumerate(batches):
        recording: AbstractContextManager[list[Routed]] = experts.recording() if experts else nullcontext([])
        with precision, recording as routed:
            inputs = model_inputs(model, batch, *part)
            loss = model(**inputs, use_cache=False, num_items_in_batch=max(supervised, 1)).loss
        penalty = experts.add_row(row, routed) if experts else 0.0
        reduce_gradients(model, row == len(batches) - 1, is_deferred)
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
