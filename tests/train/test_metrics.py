"""Progress output without a terminal."""

from __future__ import annotations

import io
import time

from rich.console import Console

from solo_vlm.train.metrics import ProgressLines


def test_progress_lines_report_start_interval_and_end():
    output = io.StringIO()
    with ProgressLines(Console(file=output), interval=0.05) as progress:
        task = progress.add_task("stage1", total=1200, unit="step", metrics={})
        progress.update(task, completed=300, metrics={"loss": 2.5})
        deadline = time.monotonic() + 30
        while output.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        progress.update(task, completed=1200)
        progress.update(task, completed=1200)
    first, *between, last = output.getvalue().splitlines()
    assert first == "stage1: step 0 of 1,200"
    assert len(between) >= 2
    assert all(line.startswith("stage1: step 300 of 1,200, loss 2.5000") for line in between)
    assert last.startswith("stage1: step 1,200 of 1,200, loss 2.5000, done in 0:00:")
