"""Configuration of a SOLO model: a decoder's configuration plus the settings of its image input."""

from __future__ import annotations

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from .original_solo import config_from_original, is_original

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DESIGNS = {
    "image_attention": ("causal", "bidirectional"),
    "image_positions": ("1d", "2d"),
    "patch_embedding": ("linear", "conv"),
}


@strict
class SoloConfig(PreTrainedConfig):
    """Configuration of a decoder-only transformer that reads raw image patches and text (SOLO paper, section
    2).

    Args:
        text_config: Configuration of the decoder (any causal language model of transformers), or a dict of
            one with its `model_type`. Default: Mistral-7B-v0.1, the paper's LLM, with the new tokens.
        vision_patch_size: Side of a square patch in pixels; a patch has `3 * vision_patch_size**2` values.
        image_mean: Mean per channel for normalizing uint8 patches, after division by 255.
        image_std: Standard deviation per channel, also after division by 255.
        image_token_id: ID of `<vpatch>`, the placeholder of one patch.
        vision_start_token_id: ID of `<vision>`, before an image.
        vision_row_token_id: ID of `<vrow_sep>`, between two rows of patches.
        vision_end_token_id: ID of `</vision>`, after an image.
        image_attention: "causal" (the paper's), or "bidirectional": patches of an image also attend to later
            patches of the same image.
        image_positions: "1d" (the paper's: a patch has the position of its token), or "2d": text position,
            row and column, see `positions_solo`.
        rope_base_2d: Base of the RoPE frequencies of rows and columns. Default: the decoder's frequencies.
        patch_embedding: "linear" (the paper's), or "conv": a convolution over each quarter of a patch, GELU
            and one over the four quarters (Diao et al. 2025, "EVEv2", section 3.1).
        use_cache: Whether forward passes outside training return a key/value cache by default.
        lm_head_bias: Whether the LM head has a bias, as in a few families (Phi, GPT-J).
        tie_word_embeddings: Whether the LM head is the token embedding; copied from `text_config`.
    """

    model_type = "solo"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: Any = None  # a PreTrainedConfig after initialization
    vision_patch_size: int = 32
    image_mean: list[float] | tuple[float, ...] = IMAGENET_MEAN
    image_std: list[float] | tuple[float, ...] = IMAGENET_STD
    image_token_id: int = 32000
    vision_start_token_id: int = 32001
    vision_row_token_id: int = 32002
    vision_end_token_id: int = 32003
    image_attention: Literal["causal", "bidirectional"] = "causal"
    image_positions: Literal["1d", "2d"] = "1d"
    rope_base_2d: float | None = None
    patch_embedding: Literal["linear", "conv"] = "linear"
    use_cache: bool = True
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type", "mistral")
            self.text_config = CONFIG_MAPPING[model_type](**self.text_config)
        elif self.text_config is None:
            self.text_config = CONFIG_MAPPING["mistral"](vocab_size=32064, rms_norm_eps=1e-5)
        # The composed model must agree with the decoder's own flag, otherwise it would untie the weights.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if kwargs.pop("bidirectional_images", False):  # name until version 0.4
            self.image_attention = "bidirectional"
        for name, known in _DESIGNS.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} = {value!r}: expected {' or '.join(known)}")
        check_rope_base_2d(self.rope_base_2d, self.image_positions)
        side, ids = self.vision_patch_size, self.vision_token_ids
        if type(side) is not int or side < 1:
            raise ValueError(f"vision_patch_size = {side!r} is no positive integer")
        if self.patch_embedding == "conv" and side % 2:
            raise ValueError(f"vision_patch_size = {side} is odd: patch_embedding=conv needs an even one")
        if len(set(ids)) < len(ids) or any(type(one) is not int or one < 0 for one in ids):
            raise ValueError(f"vision_token_ids {ids} are not four different tokens")
        if not all(_is_number(one) and one > 0 for one in self.image_std):
            raise ValueError(f"image_std={self.image_std} is not positive and finite")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(_is_number(one) for one in values):
                raise ValueError(f"{name}={values} are not three finite numbers, one per channel")
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a `config.json`, also that of an original SOLO checkpoint."""
        settings, kwargs = super().get_config_dict(*args, **kwargs)
        return config_from_original(settings) if is_original(settings) else settings, kwargs

    @property
    def locates_images(self) -> bool:
        """Whether the decoder needs to know which tokens belong to which image."""
        return self.image_attention == "bidirectional" or self.image_positions == "2d"

    @property
    def is_paper_design(self) -> bool:
        """Whether images are read as in the paper: causally, with 1-D positions, by one linear layer."""
        return not self.locates_images and self.patch_embedding == "linear"

    @property
    def patch_dim(self) -> int:
        """Number of values of a flattened patch: 3 * side * side (3072 for 32 x 32)."""
        return 3 * self.vision_patch_size**2

    @property
    def embedding_size(self) -> int:
        """Size of token and patch embeddings, from which small OPT models project to the hidden size."""
        return int(getattr(self.text_config, "word_embed_proj_dim", self.text_config.hidden_size))

    @property
    def vision_token_ids(self) -> tuple[int, int, int, int]:
        """IDs of `<vpatch>`, `<vision>`, `<vrow_sep>` and `</vision>`."""
        return (
            self.image_token_id,
            self.vision_start_token_id,
            self.vision_row_token_id,
            self.vision_end_token_id,
        )


def check_rope_base_2d(base: Any, positions: str) -> None:
    """Check the base of the RoPE frequencies of rows and columns.

    Raises:
        ValueError: It is not a number above 1, or positions are 1-D.
    """
    if base is None:
        return
    if positions != "2d":
        raise ValueError("rope_base_2d has no effect on 1-D positions: also set image_positions to 2d")
    if not _is_number(base) or not base > 1:
        raise ValueError(f"rope_base_2d = {base} must be a number above 1, such as 10000")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


__all__ = ["SoloConfig"]
