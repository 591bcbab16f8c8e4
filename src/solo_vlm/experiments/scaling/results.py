"""The results of a sweep: one row a run, in a parquet file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from solo_vlm.experiments.scaling.sweep_run import SweepRun
from solo_vlm.models.load import load_config
from solo_vlm.models.shape import parameters
from solo_vlm.train.metrics import read_metrics
from solo_vlm.utils.files import new_file

RESULTS = "results.parquet"

SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("size", pa.string()),
        ("holdout", pa.bool_()),
        ("n", pa.int64()),  # parameters as the sweep counts them
        ("d", pa.int64()),  # text and vision tokens
        ("loss", pa.float64()),  # on the validation data, at the end
        ("n_non_embedding", pa.int64()),
        ("n_total", pa.int64()),
        ("d_text", pa.int64()),
        ("d_vision", pa.int64()),
        ("d_supervised", pa.int64()),
        ("flops", pa.float64()),  # of training
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("learning_rate", pa.float64()),
        ("recipe", pa.string()),
    ]
)


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the table."""
    with new_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), partial)


def run_results(run: SweepRun, count: str) -> dict[str, Any]:
    """The row of a finished run.

    Args:
        run: of the sweep.
        count: which parameters are N, "non_embedding" or "total".
    """
    n = count_parameters(run.folder / "model")
    steps = read_metrics(run.folder)
    d = {
        kind: int(sum(step[f"{kind}_tokens"] for step in steps)) for kind in ("text", "vision", "supervised")
    }
    return {
        "run": run.name,
        "size": run.size,
        "holdout": run.holdout,
        "n": n[count],
        "d": d["text"] + d["vision"],
        "loss": steps[-1]["validation_loss"],
        **{f"n_{kind}": value for kind, value in n.items()},
        **{f"d_{kind}": value for kind, value in d.items()},
        "flops": float(sum(step["flops"] for step in steps)),
        "steps": len(steps),
        "seconds": sum(step["step_seconds"] for step in steps),
        "learning_rate": run.recipe.optimizer.learning_rate,
        "recipe": json.dumps(run.recipe.model_dump(mode="json")),
    }


def count_parameters(model: Path) -> dict[str, int]:
    """Parameters of a model: "non_embedding", of the decoder's layers and norms alone, and "total"."""
    counts = parameters(load_config(model))
    return {"non_embedding": counts.attention + counts.mlp + counts.norms, "total": counts.total}
