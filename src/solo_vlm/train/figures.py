"""What a step has cost and used: tokens, time, FLOPs, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from solo_vlm.data.encode import Encoder
from solo_vlm.data.loader import LoadedSequence
from solo_vlm.models.flops import ModelShape, training_flops
from solo_vlm.train.estimate.devices import recognize_device
from solo_vlm.train.parallel.processes import Processes
from solo_vlm.train.step import supervised_tokens
from solo_vlm.utils.errors import SoloError

_COUNTED = ("supervised", "documents", "tokens", "vision", "flops")


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

    Attributes:
        counts: of the step, over all processes.
    """

    def __init__(self, config: Any, encoder: Encoder, processes: Processes, frozen: bool = False) -> None:
        try:
            self._shape: ModelShape | None = ModelShape.of(config)
        except SoloError:  # FLOPs and MFU are then unknown
            self._shape = None
        self._frozen = frozen
        self._vision_ids = encoder.vision_ids
        self._processes = processes
        device = recognize_device(torch.cuda.get_device_name()) if processes.device.type == "cuda" else None
        self._peak = device.peak_flops * processes.layout.processes if device else None
        self._started = time.perf_counter()
        self._waited = 0.0
        self.counts = dict.fromkeys(_COUNTED, 0)

    def start(self) -> None:
        """A step begins: with waiting for its data."""
        self._started = time.perf_counter()
        self.counts = dict.fromkeys(self.counts, 0)

    def read(self) -> None:
        """The data of the step are there."""
        self._waited = time.perf_counter() - self._started

    def count(self, sequences: Sequence[LoadedSequence], ended: bool) -> tuple[list[int], bool]:
        """Count packed sequences of this process for the step, and add up those of all processes.

        Args:
            sequences: what this process has read since the last call.
            ended: whether its data have.

        Returns:
            How many each share of the data had, and whether the data of all have ended.
        """
        shares = self._processes.layout.data
        counted = sum(map(self._count, sequences), np.zeros(len(_COUNTED), np.int64))
        of_shares = [len(sequences) * (rank == self._processes.data_rank) for rank in range(shares)]
        *totals, ends = map(int, self._processes.sum(*of_shares, *counted.tolist(), ended))
        for name, total in zip(_COUNTED, totals[shares:], strict=True):
            self.counts[name] += total
        return totals[:shares], ends == shares

    def _count(self, sequence: LoadedSequence) -> NDArray[np.int64]:
        """Figures of a packed sequence, in the order of `_COUNTED`."""
        batch = sequence.batch
        lengths = np.diff(batch["cu_seq_lens_q"].numpy())[: sequence.documents]
        supervised = supervised_tokens([batch])
        vision = int(np.isin(batch["input_ids"].numpy(), self._vision_ids).sum())
        flops = self._flops(lengths, len(batch["pixel_values"]), supervised)
        return np.array([supervised, sequence.documents, sequence.tokens, vision, flops])

    def figures(self, capacity: int) -> dict[str, float]:
        """The figures of the step, which has just ended.

        Args:
            capacity: tokens of the global batch, padding included.
        """
        seconds = time.perf_counter() - self._started
        counts = self.counts
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
        if self._shape is None:
            return 0
        return training_flops(self._shape, lengths, patches, supervised, frozen=self._frozen)


def memory_gb(device: torch.device) -> float:
    """Most memory held so far, in 10^9 bytes: on the accelerator, or by this process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
