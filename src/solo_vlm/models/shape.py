"""The shape of a model: what its configuration alone says about its layers, and so its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from solo_vlm.utils.errors import SoloError


@dataclass(frozen=True)
class _Family:
    """What sets a family of decoders apart from Llama, where its configuration does not say it.

    Attributes:
        norms: RMS norms in a layer, each as wide as the hidden states.
        head_norms: RMS norms of queries and keys, each as wide as a head.
        qkv_bias: whether the projections to queries, keys and values have biases.
    """

    norms: int = 2
    head_norms: int = 0
    qkv_bias: bool = False


_FAMILIES = {
    "gemma": _Family(),
    "gemma2": _Family(norms=4),
    "gemma3_text": _Family(norms=4, head_norms=2),
    "granite": _Family(),
    "llama": _Family(),
    "mistral": _Family(),
    "phi3": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_norms=2),
    "smollm3": _Family(),
}


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, by part.

    Attributes:
        embedding: of tokens.
        patch_embedding: of image patches; 0 in an LLM.
        attention: projections of all layers.
        mlp: of all layers.
        norms: of all layers, and the last one.
        head: 0 where it is tied to the embedding.
    """

    embedding: int
    patch_embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class ModelShape:
    """A decoder with gated MLPs and grouped queries, and the patch embedding of a SOLO model.

    Attributes:
        hidden: size of the hidden states.
        mlp: size inside the MLP.
        query: size of all queries of a token together (heads * head size).
        key: size of all its keys, likewise.
        heads: query heads.
        norms: RMS norms in a layer, each as wide as the hidden states.
        head_norms: RMS norms in a layer, each as wide as a head.
        vocabulary: rows of the embedding.
        patch: numbers in an image patch; 0 in an LLM.
        tied: whether the head is the embedding.
        windows: for each layer how many tokens a query sees, itself included; None: all before it.
        attention_bias: parameters of the biases in a layer's attention.
        mlp_bias: parameters of the biases in a layer's MLP.
    """

    hidden: int
    mlp: int
    query: int
    key: int
    heads: int
    norms: int
    head_norms: int
    vocabulary: int
    patch: int
    tied: bool
    windows: tuple[int | None, ...]
    attention_bias: int
    mlp_bias: int

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape of a SOLO model, or of a plain LLM.

        Args:
            config: of transformers: a `SoloConfig`, or a decoder's.

        Raises:
            SoloError: the family of the decoder is not one that is counted here.
        """
        text = getattr(config, "text_config", config)
        family = _FAMILIES.get(text.model_type)
        if family is None:
            raise SoloError(
                f"parameters and FLOPs of {text.model_type} are not counted here, only those of "
                f"{', '.join(_FAMILIES)}"
            )
        hidden, heads, mlp = text.hidden_size, text.num_attention_heads, text.intermediate_size
        head = getattr(text, "head_dim", None) or hidden // heads
        query, key = heads * head, text.num_key_value_heads * head
        every_bias = getattr(text, "attention_bias", False)
        return cls(
            hidden=hidden,
            mlp=mlp,
            query=query,
            key=key,
            heads=heads,
            norms=family.norms,
            head_norms=family.head_norms,
            vocabulary=text.vocab_size,
            patch=getattr(config, "patch_dim", 0),
            tied=bool(text.tie_word_embeddings),
            windows=_windows(text),
            attention_bias=(query + 2 * key) * (family.qkv_bias or every_bias) + hidden * every_bias,
            mlp_bias=(2 * mlp + hidden) * getattr(text, "mlp_bias", False),
        )

    @property
    def layers(self) -> int:
        """Their number."""
        return len(self.windows)

    @property
    def projection_weights(self) -> int:
        """Weights in the four matrices of a layer's attention."""
        return 2 * self.hidden * (self.query + self.key)

    @property
    def mlp_weights(self) -> int:
        """Weights in the three matrices of a layer's MLP."""
        return 3 * self.hidden * self.mlp

    @property
    def norm_weights(self) -> int:
        """Weights in the norms of a layer."""
        return self.norms * self.hidden + self.head_norms * self.query // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads * self.key // self.query

    def splits(self, parts: int) -> bool:
        """Whether tensor parallelism can split every layer so."""
        return not any(size % parts for size in (self.heads, self.key_heads, self.mlp))

    def parameters(self) -> ParameterCounts:
        """Parameters by part."""
        return ParameterCounts(
            embedding=self.vocabulary * self.hidden,
            patch_embedding=self.patch * self.hidden,
            attention=self.layers * (self.projection_weights + self.attention_bias),
            mlp=self.layers * (self.mlp_weights + self.mlp_bias),
            norms=self.layers * self.norm_weights + self.hidden,
            head=0 if self.tied else self.vocabulary * self.hidden,
        )


def parameters(config: Any) -> ParameterCounts:
    """Parameters of a SOLO model or a plain LLM, from its configuration alone.

    Raises:
        SoloError: as `ModelShape.of`.
    """
    return ModelShape.of(config).parameters()


def _windows(text: Any) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
