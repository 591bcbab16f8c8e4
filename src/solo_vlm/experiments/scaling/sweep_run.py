"""One run of a sweep: what sets it apart from any other training run."""

from __future__ import annotations

from dataclasses import dataclass

from solo_vlm.experiments.launcher.training import TrainingRun


@dataclass(frozen=True)
class SweepRun(TrainingRun):
    """One run of a sweep.

    Attributes:
        size: name of the size.
        holdout: whether laws have to predict it.
    """

    size: str
    holdout: bool
