"""transformers' LLaVA-1.5 with a decoder of the same size, on the same images and texts.

CLIP-L/14 at 336 pixels gives 576 tokens per image of any size. The encoder is frozen; connector and decoder
are trained (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning", second stage).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from training.machine import random_model
from training.padding import Ids, padded
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from solo_vlm import SoloConfig
from solo_vlm.data.encode import IGNORE_INDEX, Document
from solo_vlm.experiments.scaling.flops import ClipShape, LlavaShape
from solo_vlm.models.flops import ModelShape
from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.train.recipe import Recipe

CLIP_L = ClipShape()
TINY_CLIP = ClipShape(image=56, patch=14, hidden=32, mlp=64, layers=2)


class LlavaBaseline:
    """LLaVA model in place of a SOLO model in the training step."""

    def __init__(
        self, config: SoloConfig, clip: ClipShape, recipe: Recipe, context: DistributedContext
    ) -> None:
        self.clip = clip
        self.shape = LlavaShape(clip, ModelShape.of(config.text_config))
        self.config = llava_config(config, clip)
        self.model = random_model(
            LlavaForConditionalGeneration, self.config, recipe, context, _freeze_encoder
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, *, squares: Tensor, **inputs: Any) -> Any:
        """Return the output of LLaVA's forward pass, with transformers' loss over all logits."""
        return self.model(pixel_values=squares, **inputs)

    def batch(
        self, images: Sequence[Image.Image], documents: Sequence[Document], vision: Ids
    ) -> dict[str, Tensor]:
        """Return a padded batch.

        Args:
            images: One image per document.
            documents: Documents, encoded for SOLO.
            vision: IDs of SOLO's image tokens, which LLaVA's replace.
        """
        image = np.full(self.clip.patches, self.config.image_token_id)
        rows = []
        for document in documents:
            text = ~np.isin(document.input_ids, vision)
            at = int(text.argmin())  # where the image begins
            ids, labels = document.input_ids[text], document.labels[text]
            hidden = np.full_like(image, IGNORE_INDEX)
            rows.append((np.insert(ids, at, image), np.insert(labels, at, hidden)))
        squares = torch.stack([_square(picture, self.clip.image) for picture in images])
        return {**padded(rows), "squares": squares}

    def flops(self, lengths: Sequence[int], supervised: int) -> int:
        """Return the FLOPs of a training step on documents of these lengths, without padding."""
        return self.shape.flops(lengths, len(lengths), supervised).training


def llava_config(config: SoloConfig, clip: ClipShape) -> LlavaConfig:
    """Return the configuration of LLaVA with a SOLO model's decoder and placeholder ID."""
    return LlavaConfig(
        vision_config=_clip_config(clip),
        text_config=deepcopy(config.text_config),  # transformers stores the attention implementation in it
        image_token_index=config.image_token_id,
        image_seq_length=clip.patches,
        attn_implementation="sdpa",
    )


def _clip_config(clip: ClipShape) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=clip.image,
        patch_size=clip.patch,
        hidden_size=clip.hidden,
        intermediate_size=clip.mlp,
        num_hidden_layers=clip.layers,
        num_attention_heads=max(clip.hidden // 64, 1),
    )


def _freeze_encoder(model: PreTrainedModel) -> None:
    model.model.vision_tower.requires_grad_(False)


def _square(image: Image.Image, side: int) -> Tensor:
    """Return (3, side, side) float32, normalized for CLIP."""
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    normalized = (pixels - OPENAI_CLIP_MEAN) / np.array(OPENAI_CLIP_STD)
    return torch.from_numpy(normalized.astype(np.float32)).permute(2, 0, 1)
