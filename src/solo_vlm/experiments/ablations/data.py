"""The data of an ablation: drawn, or derived from others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from solo_vlm.data.sample import Sample, parse_sample
from solo_vlm.data.samples_file import write_samples
from solo_vlm.data.sources import all_rows
from solo_vlm.experiments.ablations.settings import AblationSettings
from solo_vlm.quickstart.data.drawn import draw_toy_data


def prepare_data(settings: AblationSettings) -> None:
    """Write the data that are to be drawn or derived, unless they are there.

    Raises:
        SoloError: what is there was drawn with other settings, or what is to be shuffled cannot be read.
    """
    root = Path(settings.root)
    if settings.toy_data:
        draw_toy_data(root / "data", settings.toy_data)
    for out, source in settings.shuffle_images.items():
        if not (root / out).exists():
            shuffle_images(root / source, root / out)


def shuffle_images(source: Path, out: Path, seed: int = 0) -> None:
    """Write the samples of a source with their images dealt out anew, at random.

    What an image shows and what is said of it then have nothing to do with each other; images, texts and
    their numbers stay. Samples with several images trade with those that have as many. All are in memory at
    once.

    Args:
        source: to read.
        out: parquet file to write.
        seed: of the permutation.

    Raises:
        SoloError: the source cannot be read.
        SampleError: a sample of it makes no sense.
    """
    samples = [parse_sample(row) for row in all_rows(source)]
    alike: dict[int, list[int]] = defaultdict(list)  # numbers of the samples with as many images
    for number, sample in enumerate(samples):
        alike[len(sample.images)].append(number)
    shuffled = list(samples)
    rng = np.random.default_rng(seed)
    for numbers in alike.values():
        for number, other in zip(numbers, rng.permutation(numbers), strict=True):
            shuffled[number] = replace(samples[number], images=samples[other].images)
    write_samples(out, map(_row, shuffled))


def _row(sample: Sample) -> dict[str, Any]:
    images = [
        {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": image}
        for image in sample.images
    ]
    return {"id": sample.id, "messages": sample.messages, "images": images}
