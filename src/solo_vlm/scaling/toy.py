"""What a toy sweep starts from: the embedded data, held-out data of the same kind, and a small LLM."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solo_vlm.data.samples_file import write_samples
from solo_vlm.data.sources import open_source
from solo_vlm.data.toy import write_toy_data
from solo_vlm.errors import SoloError
from solo_vlm.files import new_file
from solo_vlm.quickstart.llm import training_texts, write_untrained_llm
from solo_vlm.scaling.sweep_settings import ToySettings

_KINDS = ("text", "stage2")


def prepare_toy(root: Path, llm: Path, settings: ToySettings) -> None:
    """Write `root/data/{text,stage2,heldout_text,heldout_stage2}.parquet` and the LLM, unless they are there.

    The held-out samples come from the same generator under the next seed; none of them, as a whole, is in the
    training data.

    Raises:
        SoloError: the data there were drawn with other settings.
    """
    mark = root / "data" / "toy.json"
    drawn = settings.model_dump()
    if mark.is_file():
        if json.loads(mark.read_text()) != drawn:
            raise SoloError(f"{mark.parent} holds other toy data: remove {root}, or choose another root")
    else:
        _draw(mark.parent, settings)
        with new_file(mark) as partial:
            partial.write_text(json.dumps(drawn) + "\n")
    if not llm.exists():
        write_untrained_llm(llm, training_texts(root / "data", _KINDS), settings.seed)


def _draw(folder: Path, settings: ToySettings) -> None:
    nothing = dict.fromkeys(
        ("stage1", "stage3", "sft", "heldout_digits", "heldout_captions", "heldout_qa"), 0
    )
    counts = {kind: getattr(settings, kind) for kind in _KINDS}
    write_toy_data(folder, settings.seed, **nothing, **counts)
    for name in nothing:
        (folder / f"{name}.parquet").unlink()
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        # Some will turn out to be known: short texts of a small vocabulary repeat.
        more = {kind: 2 * getattr(settings, f"heldout_{kind}") for kind in _KINDS}
        write_toy_data(Path(fresh), settings.seed + 1, **nothing, **more)
        for kind in _KINDS:
            known = {_content(row) for row in _rows(folder / f"{kind}.parquet")}
            new = [row for row in _rows(Path(fresh) / f"{kind}.parquet") if _content(row) not in known]
            write_samples(folder / f"heldout_{kind}.parquet", new[: getattr(settings, f"heldout_{kind}")])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    source = open_source(path)
    for unit in range(len(source)):
        yield from source.read(unit)


def _content(row: dict[str, Any]) -> str:
    return repr((row["messages"], row["images"]))
