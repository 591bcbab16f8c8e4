"""SOLO: a decoder-only transformer that reads raw image patches through one linear layer.

The decoder is any language model of transformers, unchanged, with its own attention backends, caches, LoRA,
quantization and parallel plans. Source: "A Single Transformer for Scalable Vision-Language
Modeling" (TMLR 2024), section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, StaticCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel
from transformers.utils.generic import can_return_tuple

from .configuration_solo import SoloConfig
from .original_solo import ORIGINAL_KEYS
from .positions_solo import image_layout, rotated_by, use_2d_positions

PACKED_ATTENTION = "solo_packed"  # the training attention, which makes its own masks per document
_TAKE_MASKS = ("eager", "sdpa", "flex_attention")

# Families that would ignore masks of images in silence, or compute text differently with them.
_IGNORE_MASKS = ("gpt_neo", "inkling2_text", "inkling_text", "rwkv", "xlstm")

# Biases by which routers choose experts: rounded to bfloat16, as some families do, they choose others.
ROUTER_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")

# Families that scale by the norm of an embedding, whose gradient at zero would be NaN.
NORMED_EMBEDDINGS = ("gemma3n_text",)
_ALMOST_ZERO = 1e-12

# Families that compute logits in float32 whatever the dtype of their weights, which matters before a cap.
_FLOAT32_LOGITS = ("beam", "inkling2_text", "xlstm")

# Caches of transformers 5.23 that fail or change logits; tests compare all families.
_WITHOUT_CACHE = ("xlstm",)
_WITHOUT_STATIC_CACHE = ("bloom", "gpt_neo", "inkling2_text", "inkling_text", "zaya")
_CANNOT_CUT_CACHE = ("zaya",)
_DYNAMIC_CACHES = (None, "dynamic", "offloaded", "quantized")

_GENERATION_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)

IGNORE_INDEX = -100
CHUNK_SIZE = 1024  # supervised positions per chunk of logits


@dataclass
class SoloCausalLMOutputWithPast(ModelOutput):
    """Output of `SoloForConditionalGeneration`.

    Attributes:
        loss: Scalar; None without labels.
        logits: (batch, kept positions, vocabulary); None in training with labels (see `forward`).
        past_key_values: Cache of the decoder.
        cache_params, state: Instead of it, the state of a decoder that has no cache of keys and values.
        hidden_states: One (batch, length, hidden) tensor per layer, on request.
        attentions: One (batch, heads, length, length) tensor per layer, on request.
        router_logits: One (batch * length, experts) tensor per layer of experts, on request.
        image_hidden_states: (num_patches, hidden), the embeddings at the `<vpatch>` positions.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    cache_params: Any = None
    state: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class SoloModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `SoloModel`: the decoder's output and `image_hidden_states` (num_patches, hidden).

    Mamba returns its states as `cache_params`, RWKV as `state`.
    """

    cache_params: Any = None
    state: Any = None
    router_logits: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class SoloPreTrainedModel(PreTrainedModel):
    """Architecture properties for transformers; the decoder provides the rest."""

    config: SoloConfig
    config_class = SoloConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ROUTER_BIASES
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """Let transformers initialize the decoder as its own: buffers of Falcon-H1 would stay undefined."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, also from an original SOLO checkpoint (which is then saved in this format).

        An original checkpoint gets the vision IDs of SOLO-7B; `solo_vlm.models.load.load_model` reads them
        from its tokenizer.

        Raises:
            ValueError: The weights have another patch embedding than the configuration, as after an edit.
        """
        kwargs.setdefault("key_mapping", ORIGINAL_KEYS)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if any("embed_vision_patch" in name for name in info["missing_keys"]):  # it would be random
            raise ValueError(
                f"patch_embedding={model.config.patch_embedding} in config.json, but the weights have another"
            )
        # Otherwise transformers would save under the original names.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not ORIGINAL_KEYS.keys() & set(conversion.source_patterns)
        ]
        return (model, info) if wants_info else model


def make_patch_embedding(config: SoloConfig) -> nn.Module:
    """Make the layer that maps (num_patches, patch_dim) to (num_patches, hidden)."""
    if config.patch_embedding == "conv":
        return ConvPatchEmbedding(config.vision_patch_size, config.embedding_size)
    return nn.Linear(config.patch_dim, config.embedding_size, bias=False)


class ConvPatchEmbedding(nn.Module):
    """Two convolutions within a patch: over each quarter, then over the four of them."""

    def __init__(self, side: int, hidden_size: int) -> None:
        super().__init__()
        self.side = side
        width = max(hidden_size // 4, 8)  # 1024 in a 7B model, as in EVEv2
        self.quarters = nn.Conv2d(3, width, side // 2, stride=side // 2)
        self.whole = nn.Conv2d(width, hidden_size, 2)

    def forward(self, patches: Tensor) -> Tensor:
        """Map (num_patches, 3 * side * side) to (num_patches, hidden)."""
        pixels = patches.unflatten(-1, (3, self.side, self.side))
        return self.whole(F.gelu(self.quarters(pixels))).flatten(1)


class SoloModel(SoloPreTrainedModel):
    """Decoder with one linear layer, or two convolutions, that embed image patches."""

    def __init__(self, config: SoloConfig) -> None:
        super().__init__(config)
        self._can_compile_fullgraph = config.image_positions == "1d"
        self.embed_vision_patch = make_patch_embedding(config)
        self.set_decoder(AutoModel.from_config(config.text_config))
        self.post_init()

    def set_decoder(self, decoder: PreTrainedModel) -> None:
        """Use a base model as the decoder, with the positions of the configuration.

        Raises:
            ValueError: The decoder does not support the configuration's positions or attention in images.
        """
        family = self.config.text_config.model_type
        if self.config.image_attention == "bidirectional" and family in _IGNORE_MASKS:
            raise ValueError(
                f"image_attention=bidirectional: {family} follows no masks of images: use causal"
            )
        if self.config.image_positions == "2d":
            use_2d_positions(decoder, self.config.text_config, self.config.rope_base_2d)
        self.language_model = decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def embed_tokens(self, input_ids: Any) -> Tensor:
        """Embed (batch, length) token IDs as the decoder does when it is given them."""
        embeddings: Tensor = self.get_input_embeddings()(input_ids)
        if self.config.text_config.model_type == "falcon_h1":  # others scale within the module, or afterwards
            embeddings = embeddings * self.config.text_config.embedding_multiplier
        if self.config.text_config.model_type in NORMED_EMBEDDINGS:
            embeddings = without_zeros(embeddings)
        return embeddings

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed patches, for generation and other users of transformers' interface.

        Args:
            pixel_values: See `embed_patches`.
            image_grid_thw: (num_images, 3) int64, (1, rows, columns) per image; only needed to split
                `pooler_output` by image.

        Returns:
            `last_hidden_state`, (num_patches, hidden), and `pooler_output`, a list of one such tensor per
            image, or per patch without grids: beam search must not mix the images of several chats.
        """
        features = self.embed_patches(pixel_values)
        sizes = [1] * features.shape[0] if image_grid_thw is None else image_grid_thw.prod(-1).tolist()
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=list(features.split(sizes)) or [features]
        )

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Embed patches, and add the token embedding of `<vpatch>` as in the original code.

        Args:
            pixel_values: (num_patches, 3 * size * size), uint8 pixels or normalized floats, each patch
                flattened channel first.

        Returns:
            (num_patches, hidden).
        """
        patches = pixel_values if pixel_values.is_floating_point() else self._normalize(pixel_values)
        placeholder = torch.tensor([self.config.image_token_id], device=patches.device)
        token = self.embed_tokens(placeholder)  # (1, hidden)
        return self.embed_vision_patch(patches.to(token.dtype)) + token

    def _normalize(self, patches: Tensor) -> Tensor:
        """Normalize (num_patches, dim) uint8 pixels by channel, in float32."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=patches.device)[:, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        channels = patches.float().unflatten(-1, (3, -1)) / 255.0  # (num_patches, 3, size * size)
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
        layout: Tensor | None = None,
        **kwargs: Any,
    ) -> SoloModelOutputWithPast:
        """Run the decoder over text tokens and image patches.

        In a packed batch, a row holds several documents: `position_ids` restart with each, there is no
        `attention_mask`, and documents do not attend to each other.

        Args:
            input_ids: (batch, length) int64, with one `<vpatch>` per patch.
            pixel_values: (num_patches, dim), see `embed_patches`; may have zero patches.
            image_grid_thw: (num_images, 3) int64.
            attention_mask: (batch, length), 0 at padding; None for a packed batch.
            position_ids: (batch, length) int64.
            past_key_values: Cache of an earlier call.
            inputs_embeds: (batch, length, hidden), instead of `input_ids`.
            use_cache: Whether to return a cache. Default: the configuration's; False in training and for a
                packed batch, where a cache would let documents attend to each other.
            mm_encoder_outputs: {"image": output of `get_image_features`}, instead of `pixel_values`.
            layout: (4, batch, at least length), the `image_layout` of the sequence up to the last token.
                Default: that of `input_ids`, if there is no cache. Not needed for causal attention with 1-D
                positions.
            **kwargs: Passed to the decoder.

        Raises:
            ValueError: Inputs contradict each other, or patches, `<vpatch>` tokens and `image_grid_thw`
                differ in number (on CUDA: a device-side assertion).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("give pixel_values or mm_encoder_outputs, not both")
        if use_cache is None:
            may_be_packed = position_ids is not None and attention_mask is None and past_key_values is None
            use_cache = self.config.use_cache and not self.training and not may_be_packed

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (batch, length, hidden)
        features = None
        if pixel_values is not None:
            features = self.embed_patches(pixel_values)
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
        bidirectional = self.config.image_attention == "bidirectional" and inputs_embeds.shape[1] > 1
        in_2d = self.config.image_positions == "2d"
        if layout is None and (bidirectional or in_2d):
            layout = self._layout(input_ids, position_ids, past_key_values)
        if layout is not None and bidirectional:
            decoder, index = self.language_model.config, layout[0][:, -inputs_embeds.shape[1] :]
            if decoder._attn_implementation == PACKED_ATTENTION:
                kwargs.setdefault("image_index", index)
            else:
                attention_mask = image_masks(
                    decoder, index, inputs_embeds, attention_mask, position_ids, past_key_values
                )

        if kwargs.get("cache_params") is not None and attention_mask is not None:
            attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]  # the state contains the past
        # A compiler cannot trace the rotation.
        with rotated_by(layout) if layout is not None and in_2d else nullcontext():
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **(self._token_inputs(input_ids) | kwargs),
            )
        return SoloModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values", past_key_values),
            cache_params=outputs.get("cache_params"),
            state=outputs.get("state"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=outputs.get("router_logits"),
            image_hidden_states=features,
        )

    def _token_inputs(self, input_ids: Tensor | None) -> dict[str, Tensor]:
        """Return what the decoder derives from token IDs besides their embeddings.

        Gemma 3n and Gemma 4 have another embedding per layer. Patches, and tokens beyond its table, have that
        of the padding token, as images have in these families' own multimodal models.
        """
        text_config = self.config.text_config
        if getattr(text_config, "ple_layer_ids", None):  # hashed n-grams of Qwen 4
            return {} if input_ids is None else {"ple_input_ids": input_ids}
        if not getattr(text_config, "hidden_size_per_layer_input", None):
            return {}
        if input_ids is None:
            raise ValueError(f"{text_config.model_type} needs input_ids for its per-layer embeddings")
        known = (input_ids != self.config.image_token_id) & (
            input_ids < text_config.vocab_size_per_layer_input
        )
        tokens = input_ids.where(known, text_config.pad_token_id or 0)
        return {"per_layer_inputs": self.language_model.get_per_layer_inputs(tokens)}

    def _layout(
        self, input_ids: Tensor | None, position_ids: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        if input_ids is None:
            raise ValueError("bidirectional attention and 2-D positions need input_ids to locate the images")
        if past_key_values is not None and int(past_key_values.get_seq_length()):
            raise ValueError("bidirectional attention and 2-D positions with a cache need the whole layout")
        return image_layout(input_ids, self.config.vision_token_ids, position_ids)

    def _placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Return the mask of `<vpatch>` positions, (batch, length) bool."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.embed_tokens(placeholder)).all(-1)


def without_zeros(embeddings: Tensor) -> Tensor:
    """Move embeddings of zeros, (..., hidden), such as Gemma's padding, by far less than a norm's epsilon."""
    is_zero = (embeddings == 0).all(-1, keepdim=True)
    return embeddings + is_zero.to(embeddings.dtype) * _ALMOST_ZERO


def _require_count(count: Tensor, patches: int, things: str) -> None:
    """Raise if a scalar count differs; on CUDA asynchronously, to avoid a synchronization."""
    if count.device.type == "cuda" or torch.compiler.is_compiling():
        torch._assert_async(count == patches, f"patches and {things} differ in number")
    elif count.device.type != "meta" and int(count) != patches:
        raise ValueError(f"{patches} patches for {int(count)} {things}: they must be equal")


class SoloForConditionalGeneration(SoloPreTrainedModel, GenerationMixin):
    """SOLO with a language-model head, for training and for generating text from text and images."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SoloConfig) -> None:
        super().__init__(config)
        self.model = SoloModel(config)
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        self.lm_head: nn.Module = nn.Linear(
            config.embedding_size, config.text_config.vocab_size, bias=config.lm_head_bias
        )
        tokens = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is tokens)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
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

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one step of generation.

        Add the `image_layout` of the sequence. Start anew where LongRoPE changes the keys of all tokens, and
        at each step of a decoder without a cache.

        Raises:
            ValueError: Images have to be located, but the sequence lacks tokens that are in the cache.
        """
        layout = None
        cached = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if self.config.locates_images:
            if cached and next_sequence_length is None:
                raise ValueError(
                    "bidirectional attention and 2-D positions need the whole sequence as input_ids, with "
                    f"the {cached} tokens of the cache: leave out prefill_chunk_size"
                )
            layout = image_layout(input_ids, self.config.vision_token_ids)  # (4, batch, length)
        limits = long_rope_lengths(self.config.text_config)
        if limits and cached:
            position = torch.arange(input_ids.shape[1], device=input_ids.device)
            if layout is not None and self.config.image_positions == "2d":
                position = position + layout[1]
            if any(position[..., :cached].max() < limit <= position.max() for limit in limits):
                past_key_values = None
        if all(past is None for past in (past_key_values, kwargs.get("cache_params"), kwargs.get("state"))):
            next_sequence_length, is_first_iteration = None, True
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if layout is not None:
            inputs["layout"] = layout
            if self.config.image_attention == "bidirectional" and inputs["input_ids"].shape[1] > 1:
                inputs["attention_mask"] = kwargs.get("attention_mask")  # `forward` makes masks with images
        return inputs

    def _supports_default_dynamic_cache(self) -> bool:
        """Tell `generate` to let a decoder make its own cache if it cannot use a `DynamicCache`."""
        return takes_dynamic_cache(type(self.model.language_model))

    @property
    def _is_stateful(self) -> bool:
        """Whether a past cannot be cut, which transformers then rejects for assisted generation."""
        decoder = self.model.language_model
        is_uncut = self.config.text_config.model_type in _CANNOT_CUT_CACHE
        return is_uncut or decoder._is_stateful or _keeps_state(decoder)

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, options: dict[str, Any]
    ) -> None:
        """Reject modes of `generate` that are code of the hub, which was not tried with images.

        Raises:
            ValueError: The mode is none of transformers' own.
        """
        if generation_mode not in _GENERATION_MODES:
            raise ValueError(
                f"{generation_mode.value} is not supported: decode greedily, sample, search beams, or set "
                "prompt_lookup_num_tokens"
            )
        super()._validate_generation_mode(generation_mode, generation_config, options)

    def _assisted_decoding(self, *args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        """Verify tokens proposed from the prompt, or for a chat without images by another model.

        Raises:
            ValueError: An assistant would not see the images, or transformers does not know SOLO as one.
        """
        for name in ("assistant_early_exit", "use_mtp", "speculation_type"):
            if getattr(generation_config, name, None):
                raise ValueError(f"{name} is not supported: set prompt_lookup_num_tokens instead")
        has_images = kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")
        if has_images and kwargs.get("assistant_model") is not None:
            raise ValueError(
                "an assistant_model gets no images from transformers: leave it out, or set "
                "prompt_lookup_num_tokens instead"
            )
        return super()._assisted_decoding(*args, generation_config=generation_config, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        """Prepare the cache, if it works with the decoder's family.

        Raises:
            ValueError: It fails, or would change answers.
        """
        family, past = self.config.text_config.model_type, model_kwargs.get("past_key_values")
        if family in _WITHOUT_CACHE and generation_config.use_cache is not False:
            raise ValueError(f"the cache of {family} fails in transformers: set use_cache=False")
        is_static = generation_config.cache_implementation not in _DYNAMIC_CACHES
        if family in _WITHOUT_STATIC_CACHE and (is_static or isinstance(past, StaticCache)):
            raise ValueError(f"{family} does not work with a static cache: use a dynamic one")
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def _reorder_cache(self, past: Any, beam_idx: Tensor) -> Any:
        """Reorder the rows of a decoder's past for beam search.

        Raises:
            ValueError: A part of the past is out of reach.
        """
        if _keeps_state(self.model.language_model) or not hasattr(past, "reorder_cache"):
            family = self.config.text_config.model_type
            raise ValueError(
                f"beam search cannot reorder the states of {family}: set num_beams=1, or use_cache=False"
            )
        # MiniMax selects rows of all it holds, but would reorder keys and values alone.
        has_own_rows = type(past).batch_select_indices is not Cache.batch_select_indices
        if has_own_rows and type(past).reorder_cache is Cache.reorder_cache:
            past.batch_select_indices(beam_idx)
        else:
            past.reorder_cache(beam_idx)
        return past

    def head(self, hidden_states: Tensor) -> Tensor:
        """Map (..., hidden) to logits (..., vocabulary), scaled or capped as in the decoder's family."""
        text_config = self.config.text_config
        family = text_config.model_type
        scaling = getattr(text_config, "logits_scaling", None) or 1.0
        weight: Any = self.lm_head.weight
        if hidden_states.dtype == torch.float32:  # as residuals of Mamba are, whatever its weights
            hidden_states = hidden_states.to(weight.dtype)
        if width := getattr(text_config, "logits_mup_width_multiplier", None):  # Inkling
            hidden_states = hidden_states / width
        if family == "minicpm3":
            hidden_states = hidden_states / scaling
        logits = self.lm_head(hidden_states)
        if family.startswith("cohere"):
            logits = logits * text_config.logit_scale
        if scale := getattr(text_config, "lm_head_multiplier", None):  # Falcon-H1
            logits = logits * scale
        if family == "hyperclovax":
            logits = logits * scaling
        elif family != "minicpm3" and scaling != 1.0:  # Granite
            logits = logits / scaling
        if family in _FLOAT32_LOGITS:
            logits = logits.float()
        for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
            if cap := getattr(text_config, name, None):  # Gemma, RecurrentGemma, xLSTM
                logits = cap * torch.tanh(logits / cap)
        return logits

    @staticmethod
    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy of logits (n, vocabulary)."""
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    @staticmethod
    def whole_logits(logits: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary, given what `head` returns."""
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
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SoloCausalLMOutputWithPast:
        """Compute logits, and the loss if `labels` are given.

        In training mode with labels, the head runs in chunks over supervised positions only
        (`supervised_cross_entropy`) and `logits` is None: all logits of a 32,768-token sequence would take
        gigabytes. See `SoloModel.forward` for the other arguments.

        Args:
            labels: (batch, length) int64, -100 at unsupervised positions; shifted here.
            logits_to_keep: Number of last positions to compute logits for (0: all), or their indices.
            num_items_in_batch: Supervised tokens of the global batch, the divisor of the summed loss.
            shift_labels: (batch, length) int64, the label that each position predicts, in place of `labels`:
                the last token of a slice of a sequence predicts the first one of the next slice.
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
            shifted = labels if shift_labels is None else F.pad(shift_labels, (1, 0))
            loss = supervised_cross_entropy(
                hidden_states, shifted, self.head, num_items_in_batch, cross_entropy=self.cross_entropy
            )
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.whole_logits(self.head(hidden_states[:, kept]))
        return SoloCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            cache_params=outputs.cache_params,
            state=outputs.state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
        )


def _keeps_state(decoder: nn.Module) -> bool:
    """Return whether layers keep a state in themselves, not in a cache, as in RecurrentGemma."""
    kinds: set[Any] = {type(module) for module in decoder.modules()}
    return any(map(_is_told_only_to_cache, kinds))


@cache
def _is_told_only_to_cache(kind: Any) -> bool:
    names = signature(kind.forward).parameters.keys()
    has_past = any("past" in name or "cache_" in name or name == "state" for name in names)
    return "use_cache" in names and not has_past


def takes_dynamic_cache(decoder: type[PreTrainedModel]) -> bool:
    """Return whether decoders of a class keep their past in a `DynamicCache`, unlike Mamba and MiniMax."""
    takes_cache = "past_key_values" in signature(decoder.forward).parameters
    # transformers' rule goes by the name of the class: here the decoder's, not SOLO's.
    return takes_cache and GenerationMixin._supports_default_dynamic_cache.__func__(decoder)


def long_rope_lengths(config: PreTrainedConfig) -> list[int]:
    """Return the lengths of a sequence beyond which LongRoPE rotates its keys by other frequencies.

    Families with several kinds of layers have settings of RoPE for each.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    return [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]


def image_masks(
    config: PreTrainedConfig,
    index: Tensor,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> Any:
    """Return the decoder's causal masks, opened between patches of the same image.

    Args:
        config: Configuration of the decoder.
        index: (batch, length), image of each patch, -1 for other tokens.
        inputs_embeds: (batch, length, hidden).
        attention_mask: (batch, cached + length), 0 at padding.
        position_ids: (batch, length); a restart begins another document.
        past_key_values: Cache of earlier calls.

    Returns:
        (batch, 1, length, cached + length) mask, or a dict of masks by layer type.

    Raises:
        ValueError: The attention implementation takes no masks, or transformers makes none for the family.
    """
    if config._attn_implementation not in _TAKE_MASKS:
        raise ValueError(
            f"image_attention=bidirectional works with {', '.join(_TAKE_MASKS)} attention, "
            f"not with {config._attn_implementation}"
        )
    past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
    masks = create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        block_sequence_ids=F.pad(index, (past, 0), value=-1),  # no image continues from the cache
    )
    if masks is None or masks is attention_mask:  # transformers leaves them to the model
        raise ValueError(f"transformers makes no masks of bidirectional images for {config.model_type}")
    return masks


def supervised_cross_entropy(
    hidden_states: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    num_items_in_batch: Tensor | int | None = None,
    chunk_size: int = CHUNK_SIZE,
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = SoloForConditionalGeneration.cross_entropy,
) -> Tensor:
    """Return the next-token cross entropy over supervised positions.

    The hidden states that predict a label are gathered first. The head then runs over chunks of them, and its
    logits are recomputed in the backward pass, so memory holds at most `chunk_size * vocabulary` logits. The
    value equals the usual loss over all logits.

    Args:
        hidden_states: (batch, length, hidden), output of the decoder.
        labels: (batch, length) int64; `labels[:, t]` is the token at t, or -100 if unsupervised. May be one
            longer, for the last position to predict.
        head: Function from (n, hidden) to logits (n, vocabulary).
        num_items_in_batch: Supervised tokens of the global batch, the divisor of the summed loss. Default:
            those of this call, which gives the mean.
        chunk_size: Supervised positions per chunk.
        cross_entropy: Function from logits and targets (n,) to their summed cross entropy.

    Returns:
        Scalar float32 tensor; zero with zero gradient if nothing is supervised.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    hidden = hidden_states[:, : targets.shape[1]][supervised]  # (n, hidden)
    targets = targets[supervised]  # (n,)
    total = hidden.sum().float() * 0.0
    for chunk, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        total = total + checkpoint(_chunk_loss, chunk, target, head, cross_entropy, use_reentrant=False)
    if num_items_in_batch is None:
        num_items_in_batch = max(targets.numel(), 1)
    return total / num_items_in_batch


def _chunk_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    cross_entropy: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    return cross_entropy(head(hidden), targets)


__all__ = ["SoloForConditionalGeneration", "SoloModel", "SoloPreTrainedModel"]
