"""FLOPs until the first token, which do not depend on the machine, compared with LLaVA."""

from __future__ import annotations

from typing import Any

from answering.models import Setting
from training.llava import CLIP_L
from training.workload import Workload

from solo_vlm.experiments.scaling.flops import LlavaShape
from solo_vlm.models.flops import ModelShape, forward_flops
from solo_vlm.models.solo.processing_solo import num_image_tokens

SHAPES = ("smollm2-135m", "solo-7b")
_TEXT = 20  # text tokens after the image


def measure(setting: Setting) -> dict[str, Any]:
    """Return LLaVA's FLOPs divided by SOLO's, by decoder and image size; above 1, SOLO computes less."""
    return {"flops_over_llava": {shape: _by_size(shape, setting.sizes) for shape in SHAPES}}


def _by_size(shape: str, sizes: tuple[int, ...]) -> dict[str, float]:
    workload = Workload(samples=1)
    config = workload.config(shape)
    solo = ModelShape.of(config)
    llava = LlavaShape(CLIP_L, ModelShape.of(config.text_config))
    theirs = llava.flops([_TEXT + CLIP_L.patches], images=1, predicted=1).forward
    ratios = {}
    for size in sizes:
        rows, columns = workload.processor.image_processor.get_patch_grid(size, size)
        length = _TEXT + num_image_tokens(rows, columns)
        ours = forward_flops(solo, [length], patches=rows * columns, predicted=1).forward
        ratios[str(size)] = theirs / ours
    return ratios
