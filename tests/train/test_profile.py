"""Traces of chosen steps."""

from __future__ import annotations

import gzip
import json

import pytest
from tests.factories import ProcessGroup, run_recipe, run_settings

from solo_vlm.train import Recipe
from solo_vlm.train.profile import StepProfiler
from solo_vlm.train.recipe import ProfileSettings
from solo_vlm.utils.errors import SoloError


def traced_steps(path):
    """Return how often the optimizer stepped in a Chrome trace."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step") for event in events)


@pytest.mark.distributed
def test_each_process_writes_a_trace_of_the_chosen_steps(runs, tmp_path):
    plain = run_settings(runs, tmp_path / "out", steps=5, profile={"steps": [3, 4]})
    assert ProcessGroup(2, run_recipe, plain).wait() == [0, 0]
    traces = sorted((tmp_path / "out" / "profile").iterdir())
    assert [path.name for path in traces] == ["rank-0.json.gz", "rank-1.json.gz"]
    assert [traced_steps(path) for path in traces] == [2, 2]


def test_interrupted_recording_is_written(tmp_path):
    profiler = StepProfiler(ProfileSettings(steps=(2, 9)), tmp_path, 0)
    for step in (1, 2, 3):
        profiler.before_step(step)
        profiler.after_step(step)
    assert not (tmp_path / "profile").exists()
    profiler.close()
    assert (tmp_path / "profile" / "rank-0.json.gz").is_file()


def test_reversed_steps_are_refused(runs, tmp_path):
    with pytest.raises(SoloError, match=r"steps = \[4, 2\]: the last step comes before the first"):
        Recipe.parse(run_settings(runs, tmp_path, profile={"steps": [4, 2]}))
