"""What a step has cost and used: tokens, time, FLOPs, memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch

from solo_vlm.data.collate import PackedBatch
from solo_vlm.data.encode import Encoder
from solo_vlm.errors import SoloError
from solo_vlm.model.flops import training_flops
from solo_vlm.train.devices import recognize_device
from solo_vlm.train.processes import Processes
from solo_vlm.train.step import supervised_tokens


class StepFigures:
    """Counts one step, over all processes.

    MFU is "model FLOPs utilisation" (Chowdhery et al. 2022, appendix B): the FLOPs that the model's forward
    and backward passes need (attention counted causally and within documents, nothing that is computed
    again) over what all devices could do in that time by their data sheets (dense bfloat16).

    Args:
        config: of the model.
        encoder: knows which tokens are of images.
        processes: of the run.
        frozen: whether the decoder's weights are: they then need no gradient of their own.
    """

    def __init__(self, config: Any, encoder: Encoder, processes: Processes, frozen: bool = False) -> None:
        self._config = config
        self._frozen = frozen
        self._vision_ids = encoder.vision_ids
        self._processes = processes
        device = recognize_device(torch.cuda.get_device_name()) if processes.device.type == "cuda" else None
        self._peak = device.peak_flops * processes.layout.processes if device else None
        self._started = time.perf_counter()
        self._waited = 0.0
        self._counts = dict.fromkeys(("slots", "supervised", "documents", "tokens", "vision", "flops"), 0)
        self._stop = False

    def start(self) -> None:
        """A step begins: with waiting for its data."""
        self._started = time.perf_counter()
        self._counts = dict.fromkeys(self._counts, 0)

    def read(self) -> None:
        """The data of the step are there."""
        self._waited = time.perf_counter() - self._started

    def count(self, batch: PackedBatch, documents: int, tokens: int) -> None:
        """Count a packed sequence of this process.

        Args:
            batch: the sequence.
            documents: in it; 0: the slot is empty.
            tokens: of the documents, without the padding.
        """
        lengths = np.diff(batch["cu_seq_lens_q"].numpy())[:documents]
        supervised = supervised_tokens([batch])
        found = {
            "slots": int(documents > 0),
            "supervised": supervised,
            "documents": documents,
            "tokens": tokens,
            "vision": int(np.isin(batch["input_ids"].numpy(), self._vision_ids).sum()),
            "flops": self._flops(lengths, len(batch["pixel_values"]), supervised),
        }
        self._counts = {name: count + found[name] for name, count in self._counts.items()}

    def add_up(self) -> dict[str, int]:
        """The counts of all processes, instead of this one's."""
        totals = self._processes.sum(*self._counts.values())
        self._counts = {name: int(total) for name, total in zip(self._counts, totals, strict=True)}
        return self._counts

    def figures(self, capacity: int) -> dict[str, float]:
        """The figures of the step, which has just ended.

        Args:
            capacity: tokens of the global batch, padding included.
        """
        seconds = time.perf_counter() - self._started
        counts = self._counts
        figures = {
            "tokens_per_second": counts["tokens"] / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": self._waited,
            "supervised_tokens": counts["supervised"],
            "vision_tokens": counts["vision"],
            "text_tokens": counts["tokens"] - counts["vision"],
            "documents": counts["documents"],
            "fill": counts["tokens"] / capacity,
            "flops": counts["flops"],
            "memory_gb": memory_gb(self._processes.device),
        }
        if self._peak and counts["flops"]:
            figures["mfu"] = counts["flops"] / seconds / self._peak
        return figures

    def _flops(self, lengths: Any, patches: int, supervised: int) -> int:
        try:
            return training_flops(self._config, lengths, patches, supervised, frozen=self._frozen)
        except SoloError:  # a family that is not counted has none, and no MFU
            return 0


def memory_gb(device: torch.device) -> float:
    """Most memory held so far, in 10^9 bytes: on the accelerator, or by this process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
