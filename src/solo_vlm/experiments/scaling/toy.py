"""What a toy sweep starts from: the embedded data, held-out data of the same kind, and a small LLM."""

from __future__ import annotations

from pathlib import Path

from solo_vlm.quickstart.data.drawn import ToySettings, draw_toy_data
from solo_vlm.quickstart.llm import training_texts, write_untrained_llm


def prepare_toy(root: Path, llm: Path, settings: ToySettings) -> None:
    """Draw the data into `root/data` and write the LLM, unless they are there.

    Raises:
        SoloError: the data there were drawn with other settings.
    """
    draw_toy_data(root / "data", settings)
    if not llm.exists():
        write_untrained_llm(llm, training_texts(root / "data", ("text", "stage2")), settings.seed)
