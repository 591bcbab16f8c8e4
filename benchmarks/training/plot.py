"""Plot of the training step benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from solo_vlm.utils.files import new_file

LABELS = {
    "packed": "packed, chunked loss\n(here)",
    "packed_full_logits": "packed,\nfull logits",
    "padded": "padded,\nfull logits",
    "llava": "LLaVA,\nCLIP-L encoder",
}
_OURS, _OTHERS = "#2a6f97", "#b8c4cc"


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot speed and memory of the variants; the suffix of the path sets the format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "train_step"  # the same results give the same file
    from matplotlib import pyplot

    variants = results["variants"]
    names = [name for name in LABELS if name in variants]
    panels = {"samples_per_second": "samples per second", "peak_memory_gb": "peak memory, GB"}
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, figsize=(9, 3), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(
            [LABELS[name] for name in names],
            [variants[name][key] for name in names],
            color=[_OURS if name == "packed" else _OTHERS for name in names],
        )
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set_title(title, loc="left")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()  # shared
    with new_file(path) as partial:
        figure.savefig(
            partial, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else {}
        )
    pyplot.close(figure)
