"""The models that are asked: SOLO and LLaVA with random weights around decoders of one shape."""

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
    """What is measured, and where.

    Attributes:
        shape: Of the decoder, a folder of `recipes/`.
        device: Where the models are.
        dtype: Of weights and computation.
        sizes: Sides of the square images, in pixels.
        batches: Chats at once.
        rounds: In each of which everything has its turn.
        answers: Tokens of an answer; decoding is timed over the most.
        tiny: Models of a few thousand weights, to try the benchmark itself.
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
        model.generation_config.eos_token_id = None  # every answer is as long as every other
        return GenerationPipeline(model, self.workload.processor)

    def llava(self) -> PreTrainedModel:
        config = llava_config(self.workload.config(self.shape), self.clip)
        return self._random(LlavaForConditionalGeneration, config)

    def _random(self, kind: type[PreTrainedModel], config: Any) -> Any:
        torch.manual_seed(0)
        with self.device:
            return kind(config).to(self.dtype).eval()
