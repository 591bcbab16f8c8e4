"""The training loop: batches in, steps, metrics and checkpoints out."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.progress import Progress as ProgressBar
from transformers import set_seed

from solo_vlm.data.collate import PackedBatch
from solo_vlm.data.encode import Encoder
from solo_vlm.data.loader import PackedLoader
from solo_vlm.train.agreement import check_same_data, check_same_settings
from solo_vlm.train.checkpoint import (
    Checkpoints,
    Progress,
    load_checkpoint,
    read_progress,
)
from solo_vlm.train.estimate.plan import planned_steps
from solo_vlm.train.export import export
from solo_vlm.train.figures import StepFigures
from solo_vlm.train.manifest import write_manifest
from solo_vlm.train.metrics import MetricsLog, progress_bar
from solo_vlm.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from solo_vlm.train.parallel.processes import LONG, SHORT, Processes, start_processes
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import claim, lock
from solo_vlm.train.start import make_loader, make_model
from solo_vlm.train.step import Step, take_step
from solo_vlm.train.stopping import Stopped, StopRequest, listen
from solo_vlm.train.trackers import make_trackers
from solo_vlm.train.validation import Validation
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file

logger = logging.getLogger(__name__)

_NAMED = 20  # samples, where a loss is not finite
_SECONDS_TO_SAVE = 20.0  # what was being saved when a process failed; all are to end within a minute


@dataclass(frozen=True)
class Trained:
    """What `train` returns: the folder of the trained model, and the run's figures."""

    model: Path
    figures: dict[str, Any]


def train(recipe: Recipe, resume: bool = False, progress: ProgressBar | None = None) -> Trained:
    """Run a recipe to its end, with all processes that torchrun has started.

    A run that was interrupted goes on from its newest checkpoint if it is started again with the same
    recipe, on as many processes as you like. On a CPU with as many as before, its losses are those of an
    uninterrupted run, bit for bit.

    Args:
        recipe: the settings.
        resume: insist on going on from a checkpoint.
        progress: a bar to draw on; default: one of its own.

    Raises:
        SoloError: model or data cannot be read, the folder holds another run, nothing is there to resume,
            the recipe cannot be shared among the processes, or losses are no longer finite.
        Stopped: SIGTERM or SIGINT came; the run is saved.
    """
    stop = StopRequest()
    with start_processes(recipe, stop) as processes, listen(stop):
        if progress is not None:
            return _Run(recipe, resume, processes, progress).to_the_end(stop)
        with progress_bar(quiet=not processes.is_first) as progress:
            return _Run(recipe, resume, processes, progress).to_the_end(stop)


class _Run:
    """A run in this process: everything that a step needs, and where it stands."""

    def __init__(self, recipe: Recipe, resume: bool, processes: Processes, progress: ProgressBar) -> None:
        self.recipe = recipe
        self.processes = processes
        self.out = recipe.at(recipe.out)
        check_same_settings(recipe, processes)
        self.sources = recipe.open_sources()
        check_same_data(self.sources, processes)
        self._lock: IO[str] | None = None
        checkpoint = processes.decide(lambda: self._claim(resume))
        set_seed(recipe.seed)
        self.model, self.processor = make_model(recipe, processes)
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        layout = processes.layout
        self.loader = make_loader(recipe, self.processor, self.sources, processes.data_rank, layout.data)
        if checkpoint:
            load_checkpoint(checkpoint, self.model, self.optimizer)
            self.done = processes.decide(lambda: read_progress(checkpoint))
            self.loader.load_state_dict(self.done.data or {})
            logger.info("going on from %s", checkpoint)
        else:
            self.done = Progress(steps=recipe.steps or processes.decide(lambda: planned_steps(recipe)))
        self.checkpoints = Checkpoints(
            self.out / "checkpoints", recipe.checkpoint.keep, recipe.checkpoint.asynchronous, processes
        )
        self.validation = Validation(recipe, self.processor, processes) if recipe.validation else None
        frozen = bool(recipe.lora) or recipe.trainable != "all"
        self.counter = StepFigures(self.model.config, Encoder(self.processor), processes, frozen)
        self.log = None
        if processes.is_first:
            trackers = make_trackers(recipe, self.out, self.done.step)
            self.log = MetricsLog(self.out, trackers, progress, self.done.steps, self.done.step)

    def _claim(self, resume: bool) -> Path | None:
        if resume and not self.out.is_dir():
            raise SoloError(f"nothing to resume: {self.out} has no checkpoint")
        self._lock = lock(self.out)
        return claim(self.out, self.recipe, resume)

    def to_the_end(self, stop: StopRequest) -> Trained:
        """Take all steps; export the model and write the manifest."""
        started, tokens_before = time.perf_counter(), self.done.tokens
        try:
            for figures in self._steps(stop):
                self._note(figures, stop)
            self._finish_saving(stop)
        except BaseException:
            self.loader.close()
            # A process that fails still completes the checkpoint that all are writing.
            with suppress(Exception), stop.uninterrupted():
                self.checkpoints.finish(_SECONDS_TO_SAVE)
            with suppress(Exception):
                self._close_log()
            raise
        self.loader.close()
        self._close_log()
        self.processes.set_timeout(LONG)
        seconds = time.perf_counter() - started
        summary = {
            "steps": self.done.step,
            "tokens": self.done.tokens,
            "seconds": seconds,
            "tokens_per_second": (self.done.tokens - tokens_before) / seconds,
            "skipped_steps": self.done.skipped_steps,
            "data": self._counts(),
            "processes": asdict(self.processes.layout),
        }
        skipped = list(chain.from_iterable(self.processes.gather(self.loader.skipped())))
        model = export(self.out, self.model, self.processor, self.recipe, self.processes)
        if self.processes.is_first:
            with new_file(self.out / "skipped.jsonl") as partial:
                partial.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
            write_manifest(self.out / "manifest.json", self.recipe, self.sources, summary)
        return Trained(model, summary)

    def _steps(self, stop: StopRequest) -> Iterator[dict[str, float]]:
        """Make one optimizer step after the other; yield its figures. Ends early where the data do."""
        skipped_in_a_row = 0
        first_step = self.done.step + 1  # which may compile
        while self.done.step < (self.recipe.steps or sys.maxsize):
            global_batch, samples = self._read()
            if not global_batch:
                if not self.done.step:
                    raise SoloError("no row of the data can be used: see solo data verify")
                if self.recipe.steps:
                    logger.warning("the data ended after %d of %d steps", self.done.step, self.recipe.steps)
                return
            rate = learning_rate(self.done.step, self.done.steps, self.recipe.optimizer)
            set_learning_rate(self.optimizer, rate)
            self._seed()
            step = take_step(
                self.model,
                self.optimizer,
                global_batch,
                self.counter.counts["supervised"],
                self.recipe,
                self.processes,
            )
            self.done.step += 1
            self.done.tokens += self._capacity
            if step.finite:
                skipped_in_a_row = 0
            else:
                skipped_in_a_row += 1
                self._skip(step, samples, skipped_in_a_row)
            yield {
                "loss": step.loss,
                "learning_rate": rate,
                "gradient_norm": step.gradient_norm,
                "skipped_steps": self.done.skipped_steps,
                **self.counter.figures(self._capacity),
            }
            self._stop_if_asked(stop)
            if self.done.step == first_step:
                self.processes.set_timeout(SHORT)

    def _read(self) -> tuple[list[PackedBatch], list[list[str]]]:
        """This process's sequences of the next global batch, counted, and the names of their samples."""
        self.counter.start()
        turns = self.loader.take_together(self.recipe.global_batch, self.counter.count)
        self.counter.read()
        batches = [turn.batch if turn else self.loader.empty_batch() for turn in turns]
        return batches, [self.loader.names(turn) if turn else [] for turn in turns]

    @property
    def _capacity(self) -> int:
        """Tokens of a global batch."""
        return self.recipe.global_batch * self.recipe.data.sequence_length

    def _seed(self) -> None:
        """Chance (dropout) depends on the step, so that no checkpoint has to hold a generator's state."""
        entropy = (self.recipe.seed, self.done.step, self.processes.data_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _skip(self, step: Step, samples: list[list[str]], in_a_row: int) -> None:
        """Note a step that did not change the weights; stop where there are too many in a row."""
        self.done.skipped_steps += 1
        bad = [names for names, loss in zip(samples, step.losses, strict=True) if not math.isfinite(loss)]
        # Where every loss is finite, the gradient is to blame, and any sample may be.
        suspects = chain.from_iterable(self.processes.gather(list(chain.from_iterable(bad))))
        named = list(suspects) or list(
            chain.from_iterable(self.processes.gather(list(chain.from_iterable(samples))))
        )
        what = f"step {self.done.step}: loss {step.loss:g}, gradient norm {step.gradient_norm:g}"
        listed = "".join(f"\n  {name}" for name in named[:_NAMED])
        if in_a_row >= self.recipe.max_nonfinite:
            raise SoloError(
                f"{what}; {in_a_row} steps in a row could not be used. Look at these samples, or lower the "
                f"rate:{listed}"
            )
        logger.warning("%s; the step is skipped. Its samples:%s", what, listed)

    def _close_log(self) -> None:
        if self.log:
            self.log.close()

    def _note(self, figures: dict[str, float], stop: StopRequest) -> None:
        """After a step: validate, log and save where it is time to."""
        step, recipe = self.done.step, self.recipe
        ends = step == recipe.steps
        if self.validation and recipe.validation and (ends or step % recipe.validation.every == 0):
            figures["validation_loss"] = self.validation.loss(self.model)
        if step == 1 or ends or step % recipe.log_every == 0 or "validation_loss" in figures:
            skipped = {n: c for n, c in self._counts().items() if n.startswith("skipped")}
            if self.log:
                self.log.step(step, {**figures, **skipped})
        if self.log:
            self.log.advance(step)
        if step % recipe.checkpoint.every == 0 and not ends:
            self._save(stop)
        self.checkpoints.check()

    def _save(self, stop: StopRequest) -> None:
        self.done.data = PackedLoader.merge(self.processes.gather(self.loader.state_dict()))
        with stop.uninterrupted(), self.processes.patient():
            self.checkpoints.save(self.model, self.optimizer, self.done)

    def _finish_saving(self, stop: StopRequest) -> None:
        with stop.uninterrupted(), self.processes.patient():
            self.checkpoints.finish()

    def _stop_if_asked(self, stop: StopRequest) -> None:
        number = self.processes.max(stop.signal)  # any of them may have got it
        if not number or self.done.step == self.recipe.steps:
            return
        with stop.uninterrupted():
            self._save(stop)
            self._finish_saving(stop)
        raise Stopped(
            f"stopped by {signal.Signals(number).name}, saved after step {self.done.step}: "
            "the same command goes on from there",
            number,
        )

    def _counts(self) -> dict[str, int]:
        """Of all processes: sequences, documents, tokens, samples, and skipped ones by source and reason."""
        return dict(sum(map(Counter, self.processes.gather(self.loader.counts())), Counter()))
