"""Models of the inference benchmark: SOLO and LLaVA with random weights and decoders of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from training.llava import CLIP_L, TINY_CLIP, llava_config
from training.workload import Workload
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from solo_vlm import SoloForConditionalGeneration
from solo_vlm.experiments.scaling.flops import ClipShape
from solo_vlm.generate import GenerationPipeline


@dataclass(frozen=True)
class Setting:
    """Settings of the inference benchmark.

    Attributes:
        shape: Shape of the decoder, named by a folder of `recipes/`.
        device: Device of the models.
        dtype: Data type of weights and computation.
        sizes: Sides of the square images in pixels.
        batches: Numbers of chats per batch.
        rounds: Number of rounds, each of which measures every variant once.
        answers: Numbers of tokens per answer; decoding is timed with the largest.
        tiny: Whether to use models of a few thousand weights, to test the benchmark itself.
    """

    shape: str
    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, ...] = (336, 512, 768, 1024)
    batches: tuple[int, ...] = (1, 4, 16)
    rounds: int = 3
    answers: tuple[int, ...] = (8, 32)
    tiny: bool = False

    @property
    def clip(self) -> ClipShape:
        return TINY_CLIP if self.tiny else CLIP_L

    @property
    def workload(self) -> Workload:
        return Workload.of_tiny() if self.tiny else Workload(samples=1)

    def solo(self) -> GenerationPipeline:
        model = self._random(SoloForConditionalGeneration, self.workload.config(self.shape))
        model.generation_config.eos_token_id = None  # all answers have the same length
        return GenerationPipeline(model, self.workload.processor)

    def llava(self) -> PreTrainedModel:
        config = llava_config(self.workload.config(self.shape), self.clip)
        return self._random(LlavaForConditionalGeneration, config)

    def _random(self, kind: type[PreTrainedModel], config: Any) -> Any:
        torch.manual_seed(0)
        with self.device:
            return kind(config).to(self.dtype).eval()
