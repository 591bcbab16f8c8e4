"""AI2D: multiple-choice questions on diagrams of science books, with the labels asked for masked or not."""

from __future__ import annotations

from dataclasses import replace

from solo_vlm.evaluate.benchmarks.benchmark import Benchmark
from solo_vlm.evaluate.multiple_choice import by_column, score_listed_choices

AI2D = Benchmark(
    name="ai2d",
    title="AI2D (masked)",
    harness_task="ai2d",
    hub_id="lmms-lab-encoder/ai2d",
    hub_files="data/test-*",
    split="test",
    licence="(unchecked)",
    kind="multiple choice",
    size=3088,
    size_source="data set card of lmms-lab/ai2d",
    metric="right answers / questions, in per cent; labels in the diagram are replaced by letters",
    source="Kembhavi et al. 2016, arXiv 1603.07396",
    scorer=score_listed_choices,
    breakdown=by_column("category", "category"),
    note="The right answer is the option's place, counted from 0.",
)

AI2D_NO_MASK = replace(
    AI2D,
    name="ai2d_no_mask",
    title="AI2D (not masked)",
    harness_task="ai2d_no_mask",
    hub_id="Efficient-Large-Model/ai2d-no-mask",
    size_source="data set card of lmms-lab/ai2d-no-mask",
    metric="right answers / questions, in per cent; labels in the diagram can be read, which is easier",
)
