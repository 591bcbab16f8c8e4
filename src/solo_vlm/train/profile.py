"""Traces of chosen steps by torch's profiler."""

from __future__ import annotations

from pathlib import Path

import torch

from solo_vlm.train.recipe import ProfileSettings


class StepProfiler:
    """Recorder of consecutive steps, as one Chrome trace per process in `folder/profile`.

    Args:
        settings: Steps to record; None: none.
    """

    def __init__(self, settings: ProfileSettings | None, folder: Path, rank: int) -> None:
        self._settings = settings
        self._path = folder / "profile" / f"rank-{rank}.json.gz"
        self._profiler: torch.profiler.profile | None = None

    def before_step(self, step: int) -> None:
        """Start recording if the step, counted from 1, is one to record."""
        if self._settings and not self._profiler and self._settings.first <= step <= self._settings.last:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def after_step(self, step: int) -> None:
        """Write the trace after the last step to record."""
        if self._settings and step >= self._settings.last:
            self.close()

    def close(self) -> None:
        """Write the trace of the steps recorded so far, if any."""
        profiler, self._profiler = self._profiler, None
        if profiler:
            profiler.stop()
            self._path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
