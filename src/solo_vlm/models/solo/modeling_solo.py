"""SOLO: a decoder-only transformer that reads raw image patches through one linear layer.

The decoder is any of transformers' language models, used as it is: attention back-ends, caches, LoRA,
quantisation and parallel plans are its own. Source: "A Single Transformer for Scalable Vision-Language
Modeling" (TMLR 2024), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel
from transformers.utils.generic import can_return_tuple

from .configuration_solo import SoloConfig
from .image_attention_solo import PACKED_ATTENTION, image_index, image_masks
from .loss_solo import supervised_cross_entropy
from .original_solo import ORIGINAL_KEYS


@dataclass
class SoloCausalLMOutputWithPast(ModelOutput):
    """Output of `SoloForConditionalGeneration`.

    Attributes:
        loss: scalar, where labels were given.
        logits: (batch, kept positions, vocabulary); None in training with labels (see `forward`).
        past_key_values: the decoder's cache.
        hidden_states: one (batch, length, hidden) a layer, on request.
        attentions: one (batch, heads, length, length) a layer, on request.
        image_hidden_states: (patches, hidden), what stands at the `<vpatch>` positions.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class SoloModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `SoloModel`: the decoder's, and `image_hidden_states` (patches, hidden)."""

    image_hidden_states: Tensor | None = None


class SoloPreTrainedModel(PreTrainedModel):
    """What transformers must know of the architecture; the rest comes from the decoder."""

    config: SoloConfig
    config_class = SoloConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method; a folder of the release loads, too, and is saved in this project's format.

        The vision ids are then SOLO-7B's; `solo_vlm.models.load.load_model` asks the folder's tokenizer.
        """
        kwargs.setdefault("key_mapping", ORIGINAL_KEYS)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers would save under the names that it has read.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not ORIGINAL_KEYS.keys() & set(conversion.source_patterns)
        ]
        return loaded


class SoloModel(SoloPreTrainedModel):
    """The decoder, and the one linear layer through which images enter it."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__(config)
        self.embed_vision_patch = nn.Linear(config.patch_dim, config.text_config.hidden_size, bias=False)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed patches: one linear layer, plus the token embedding of `<vpatch>` (as the release adds it).

        Args:
            pixel_values: (patches of all images, 3 * size * size), `uint8` pixels, or floats that are
                normalised already. Each patch is flattened channel-first.
            image_grid_thw: (images, 3) int64: 1, rows, columns of each image; only needed to tell the
                images apart in `pooler_output`.

        Returns:
            `last_hidden_state` (patches, hidden) and `pooler_output`, a list of one such tensor an image.
        """
        patches = pixel_values if pixel_values.is_floating_point() else self._normalize(pixel_values)
        placeholder = torch.tensor([self.config.image_token_id], device=patches.device)
        token = self.get_input_embeddings()(placeholder)  # (1, hidden)
        features = self.embed_vision_patch(patches.to(token.dtype)) + token  # (patches, hidden)
        sizes = [features.shape[0]] if image_grid_thw is None else image_grid_thw.prod(-1).tolist()
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=list(features.split(sizes))
        )

    def _normalize(self, patches: Tensor) -> Tensor:
        """(patches, dim) `uint8` pixels to float32, normalised by channel."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=patches.device)[:, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        channels = patches.float().unflatten(-1, (3, -1)) / 255.0  # (patches, 3, size * size)
        return ((channels - mean) / std).flatten(-2)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> SoloModelOutputWithPast:
        """Run the decoder over text tokens and image patches.

        A packed batch holds several documents in one row: `position_ids` restart with each, no
        `attention_mask` is given, and documents do not see each other.

        Args:
            input_ids: (batch, length) int64, with one `<vpatch>` a patch.
            pixel_values: (patches, dim), see `get_image_features`; zero patches are allowed.
            image_grid_thw: (images, 3) int64.
            attention_mask: (batch, length), 0 at padding; leave it out for a packed batch.
            position_ids: (batch, length) int64.
            past_key_values: cache of an earlier call.
            inputs_embeds: (batch, length, hidden) instead of `input_ids`.
            use_cache: whether to return a cache. Default: the configuration's, and never in training nor
                for a packed batch, where a cache would let documents see each other.
            mm_encoder_outputs: {"image": output of `get_image_features`} instead of `pixel_values`.
            **kwargs: passed on to the decoder.

        Raises:
            ValueError: on contradicting inputs, or when patches, `<vpatch>` tokens and `image_grid_thw`
                differ in number; on CUDA that is a failed assertion of the device.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("give pixel_values or mm_encoder_outputs, not both")
        if use_cache is None:
            may_be_packed = position_ids is not None and attention_mask is None and past_key_values is None
            use_cache = self.config.use_cache and not self.training and not may_be_packed

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (batch, length, hidden)
        features = None
        if pixel_values is not None:
            features = self.get_image_features(pixel_values).last_hidden_state
        elif mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            features = torch.cat(list(mm_encoder_outputs["image"].pooler_output))
        if features is not None:
            if image_grid_thw is not None:
                _require_count(image_grid_thw.prod(-1).sum(), len(features), "places in image_grid_thw")
            is_patch = self._placeholder_mask(input_ids, inputs_embeds)  # (batch, length)
            _require_count(is_patch.sum(), len(features), "<vpatch> tokens")
            inputs_embeds = inputs_embeds.masked_scatter(is_patch.unsqueeze(-1), features.to(inputs_embeds))
        elif input_ids is not None and not torch.compiler.is_compiling():
            _require_count((input_ids == self.config.image_token_id).sum(), 0, "<vpatch> tokens")
        if self.config.bidirectional_images and inputs_embeds.shape[1] > 1:
            if input_ids is None:
                raise ValueError("attention in both directions inside images needs input_ids to find them")
            index = image_index(input_ids, self.config.image_token_id, self.config.vision_start_token_id)
            decoder = self.language_model.config
            if decoder._attn_implementation == PACKED_ATTENTION:
                kwargs["image_index"] = index
            else:
                attention_mask = image_masks(
                    decoder, index, inputs_embeds, attention_mask, position_ids, past_key_values
                )

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return SoloModelOutputWithPast(**outputs, image_hidden_states=features)

    def _placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(batch, length) bool: where `<vpatch>` stands."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)


def _require_count(count: Tensor, patches: int, things: str) -> None:
    """Raise where a scalar count differs. CUDA is not waited for: its next synchronisation fails."""
    if count.device.type == "cuda" or torch.compiler.is_compiling():
        torch._assert_async(count == patches, f"patches and {things} differ in number")
    elif count.device.type != "meta" and int(count) != patches:
        raise ValueError(f"{patches} patches for {int(count)} {things}: they must be equal")


class SoloForConditionalGeneration(SoloPreTrainedModel, GenerationMixin):
    """SOLO with its language-model head: training loss, and text generation from text and images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SoloConfig) -> None:
        super().__init__(config)
        self.model = SoloModel(config)
        self.lm_head: nn.Module = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `SoloModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def head(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden) to logits (..., vocabulary), scaled or capped as the decoder's family does it."""
        text_config = self.config.text_config
        logits = self.lm_head(hidden_states)
        if scale := getattr(text_config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scaling := getattr(text_config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if cap := getattr(text_config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SoloCausalLMOutputWithPast:
        """Logits, or the loss where `labels` are given.

        In training mode with labels, the head runs only where a label is and in chunks
        (`supervised_cross_entropy`), and `logits` is None: all logits of a 32,768-token sequence would
        take gigabytes. Arguments not named here: see `SoloModel.forward`.

        Args:
            labels: (batch, length) int64, -100 where no loss is wanted; they are shifted here.
            logits_to_keep: compute logits for the last so many positions (0: all), or for these indices.
            num_items_in_batch: supervised tokens of the whole batch, to divide the sum of losses by.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = supervised_cross_entropy(hidden_states, labels, self.head, num_items_in_batch)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.head(hidden_states[:, kept])
        return SoloCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = ["SoloForConditionalGeneration", "SoloModel", "SoloPreTrainedModel"]
