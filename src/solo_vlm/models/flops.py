"""Parameters and floating-point operations of a model, counted on the meta device from its configuration.

transformers builds the decoder without memory for its weights, and torch's `FlopCounterMode` counts one
forward pass, so every family of decoders is counted by the code that runs it. What is counted:

- Matrix products, a multiplication with an addition as two; lookups of embeddings, norms, activation
  functions, softmax and rotary embeddings are left out, as is usual (Hoffmann et al. 2022, appendix F;
  Chowdhery et al. 2022, appendix B). Of a mixture of experts, the experts that a token is routed to, and
  shared ones.
- Attention only where it is needed: between the pairs of tokens that causality, document borders and the
  sliding window or chunks of each layer leave. The count takes its heads, sizes and windows from the calls
  of transformers' attention interface.
- Linear attention and state-space layers as their PyTorch code computes them: products within chunks count,
  scans of element-wise operations (Mamba) do not.
- No recomputation (see `Flops.hardware`).

All but attention is linear in the number of tokens, so counts at two lengths give any length. What remains
quadratic belongs to families with their own attention, which is then counted as causal without a window;
sparse attention by an index (DeepSeek V3.2) as if it were dense.
"""

from __future__ import annotations

import copy
import operator
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from solo_vlm.models.load import decoder_layers
from solo_vlm.models.solo.processing_solo import num_image_tokens
from solo_vlm.utils.errors import SoloError, first_line

Lengths = Sequence[int] | NDArray[np.integer[Any]]

_MIXER = re.compile("attn|attention|mamba|mixer|conv|ssm|recurrent|temporal")
_LINEAR = (nn.Linear, Conv1D)
_PASS_THROUGH = (nn.Dropout, nn.Identity)
_LENGTH = 64  # a multiple of the chunks of linear attention; settings of Mamba 2 name theirs


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, by part.

    Attributes:
        embedding: Token embedding, with learned positions if there are any.
        patch_embedding: Patch embedding; 0 in a plain LLM.
        attention: Attention (or another mixing of tokens) of all layers, biases included.
        mlp: MLPs of all layers, biases and all experts included.
        norms: Norms of all layers, and the last one.
        head: Language-model head; 0 where it is tied to the embedding.
    """

    embedding: int
    patch_embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(vars(self).values())


class AttentionLayer(NamedTuple):
    """Attention of one layer.

    Attributes:
        flops: FLOPs per pair of tokens.
        window: Number of tokens that a query attends to, itself included; None: all before it.
        chunk: Tokens of the chunks that a document is cut into, for attention within each; None: no chunks.
    """

    flops: int
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a SOLO model or a plain LLM; `ModelShape.of` counts them.

    Attributes:
        hidden: Size of the hidden states.
        layers: Number of decoder layers.
        vocabulary: Rows of the token embedding.
        patch: Values of an image patch; 0 in a plain LLM.
        tied: Whether the head is the embedding.
        key_heads: Heads of keys and values.
        query, key: Width of the queries (mean of queries and attention output), and of the keys (mean of keys
            and values), all heads together.
        mlp: Width inside the MLP, mean of the layers; with experts, of those that a token is routed to, all
            together.
        attention: Attention layers.
        projection_flops, mlp_flops: FLOPs per token in all layers, of the projections around attention (with
            all that is not MLP) and of the MLPs.
        last_flops: Share of these that full activation checkpointing need not compute again: the last product
            of a layer, where nothing but the residual sum follows.
        linear_sizes: Sum of input and output features of all linear layers, by the last part of their names.
        active_parameters: Parameters that take part in the computation of one token.
        parameters: Parameters by part.
    """

    hidden: int
    layers: int
    vocabulary: int
    patch: int
    tied: bool
    key_heads: int
    query: int
    key: int
    mlp: int
    attention: tuple[AttentionLayer, ...]
    projection_flops: int
    mlp_flops: int
    last_flops: int
    linear_sizes: Mapping[str, int]
    active_parameters: int
    parameters: ParameterCounts

    @classmethod
    def of(cls, config: Any, reduce: Callable[[Any], None] | None = None) -> ModelShape:
        """Count a model on the meta device, which takes seconds for tens of layers.

        Args:
            config: `SoloConfig`, or the configuration of a causal language model.
            reduce: Reduces the model in place to the part to count, such as that of one process.

        Raises:
            SoloError: transformers has no such causal language model, or its code does not run on the meta
                device.
        """
        text = getattr(config, "text_config", config)
        try:
            return _count(text, getattr(config, "patch_dim", 0), reduce)
        except SoloError:
            raise
        except Exception as error:  # settings of any family, or of a model's own
            raise SoloError(f"cannot count {text.model_type}: {first_line(error)}") from error

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Window of each attention layer."""
        return tuple(layer.window for layer in self.attention)

    def with_patch(self, patch: int) -> ModelShape:
        """Return the shape with a patch embedding for `patch` values per patch; 0 removes it."""
        parameters = replace(self.parameters, patch_embedding=patch * self.hidden)
        return replace(self, patch=patch, parameters=parameters)


def count_parameters(config: Any) -> ParameterCounts:
    """Return the parameters of a SOLO model or a plain LLM, from its configuration alone.

    Raises:
        SoloError: See `ModelShape.of`.
    """
    return ModelShape.of(config).parameters


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass, by part.

    Attributes:
        projections: Projections around attention, with all that is not MLP, in all layers.
        mlp: MLPs of all layers.
        attention: Scores, and sums of values weighted by them.
        patches: Patch embedding.
        head: Language-model head, where it is run.
        last: Share of `projections` and `mlp` that is not recomputed (see `hardware`).
    """

    projections: int
    mlp: int
    attention: int
    patches: int
    head: int
    last: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Flops) -> Flops:
        return Flops(*map(operator.sub, astuple(self), astuple(other)))

    @property
    def layers(self) -> int:
        """Matrix products with the weights of the decoder's layers."""
        return self.projections + self.mlp

    @property
    def forward(self) -> int:
        """Forward pass."""
        return self.layers + self.attention + self.patches + self.head

    @property
    def training(self) -> int:
        """Forward and backward pass, the count that model FLOPs utilization (MFU) is defined by.

        The backward pass takes twice the forward pass: one product for the gradient of the weights, one for
        that of the inputs (Hoffmann et al. 2022, appendix F). Pixels need no gradient, so the patch embedding
        takes one. Recomputation does not count (Chowdhery et al. 2022, appendix B).
        """
        return 3 * (self.layers + self.attention + self.head) + 2 * self.patches

    @property
    def training_frozen(self) -> int:
        """Like `training`, where the decoder's weights and the head get no gradient, as under LoRA.

        Their inputs still do, for the patch embedding and the adapters. The adapters' own computation, about
        1% at rank 16 in a 7B model, is left out.
        """
        return 2 * (self.layers + self.head + self.patches) + 3 * self.attention

    def recomputed_parts(self, recomputed: float = 0.0) -> dict[str, float]:
        """Return the FLOPs that a training step computes again, by part of the model.

        The chunked loss always computes the logits twice. With "selective" activation checkpointing, results
        of matrix products and attention are kept, so nothing counted here is recomputed. With "full"
        checkpointing everything is but the last product of each layer: PyTorch stops once all saved tensors
        are restored.

        Args:
            recomputed: Share of the layers with full activation checkpointing.
        """
        return {
            "layers": recomputed * (self.layers - self.last),
            "attention": recomputed * self.attention,
            "head and loss": self.head,
        }

    def hardware_parts(self, recomputed: float = 0.0, frozen: bool = False) -> dict[str, float]:
        """Return the FLOPs of a training step by part of the model, including recomputation.

        Args:
            recomputed: See `recomputed_parts`.
            frozen: Whether the decoder's weights get no gradient (see `training_frozen`).
        """
        passes, again = 2 if frozen else 3, self.recomputed_parts(recomputed)
        return {
            "layers": passes * self.layers + 2 * self.patches + again["layers"],
            "attention": 3 * self.attention + again["attention"],
            "head and loss": passes * self.head + again["head and loss"],
        }

    def hardware(self, recomputed: float = 0.0) -> float:
        """Return the FLOPs of `training`, plus recomputation (see `recomputed_parts`)."""
        return sum(self.hardware_parts(recomputed).values())


def forward_flops(
    shape: ModelShape, document_lengths: Lengths, patches: int = 0, predicted: int = 0
) -> Flops:
    """Return the FLOPs of a packed batch.

    Args:
        document_lengths: (num_documents,) tokens of each document, text and vision.
        patches: Number of image patches (`<vpatch>` tokens).
        predicted: Number of positions where the head is run; in training, those with a label.
    """
    lengths = np.asarray(document_lengths, np.int64)
    tokens = int(lengths.sum())
    layers = Counter(shape.attention).items()
    return Flops(
        projections=shape.projection_flops * tokens,
        mlp=shape.mlp_flops * tokens,
        attention=sum(count * layer.flops * _visible_pairs(lengths, layer) for layer, count in layers),
        patches=2 * shape.patch * shape.hidden * patches,
        head=2 * shape.hidden * shape.vocabulary * predicted,
        last=shape.last_flops * tokens,
    )


def training_flops(
    shape: ModelShape,
    document_lengths: Lengths,
    patches: int,
    supervised_tokens: int,
    frozen: bool = False,
) -> int:
    """Return the FLOPs of a training step on a packed batch, forward and backward (see `Flops.training`).

    Args:
        document_lengths, patches: See `forward_flops`.
        supervised_tokens: Number of positions with a label.
        frozen: Whether the decoder's weights get no gradient (see `Flops.training_frozen`).
    """
    flops = forward_flops(shape, document_lengths, patches, supervised_tokens)
    return flops.training_frozen if frozen else flops.training


def image_flops(shape: ModelShape, rows: int, columns: int, before: int = 0) -> Flops:
    """Return the FLOPs that an image of rows x columns patches adds to a document after `before` tokens.

    They do not include the head.
    """
    return _span(shape, num_image_tokens(rows, columns), before, patches=rows * columns)


def text_flops(shape: ModelShape, tokens: int, before: int = 0) -> Flops:
    """Return the FLOPs that text tokens, all supervised, add to a document after `before` tokens."""
    return _span(shape, tokens, before, predicted=tokens)


def _span(shape: ModelShape, tokens: int, before: int, patches: int = 0, predicted: int = 0) -> Flops:
    return forward_flops(shape, [before + tokens], patches, predicted) - forward_flops(shape, [before])


def _visible_pairs(lengths: NDArray[np.int64], layer: AttentionLayer) -> int:
    """Return the number of (query, key) pairs in causal attention, a token with itself included."""
    if layer.chunk is not None:
        whole, rest = np.divmod(lengths, layer.chunk)
        return int(whole.sum()) * _triangle(layer.chunk) + int(_triangle(rest).sum())
    seen = lengths if layer.window is None else np.minimum(lengths, layer.window)
    return int((_triangle(seen) + (lengths - seen) * seen).sum())


def _triangle(number: Any) -> Any:
    return number * (number + 1) // 2


# --- counting -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AttentionCall:
    """Sizes of one call of the attention interface, and the window or chunk of its layer."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None

    @property
    def layer(self) -> AttentionLayer:
        return AttentionLayer(2 * self.heads * (self.key_dim + self.value_dim), self.window, self.chunk)


class _Uncountable(SoloError):
    """FLOPs that are no function of pairs of tokens."""


_calls: ContextVar[list[_AttentionCall]] = ContextVar("attention calls")
_COUNTING = "solo_counting"
_CHUNKED = "chunked_attention"  # as `layer_types` calls it
_EXPERTS = "batched_mm"  # computes the experts that a token is routed to, without looking at the values


def _record_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, None]:
    """Record the sizes of an attention call without computing it; tensors are (batch, heads, length, dim)."""
    if key.shape[2] != query.shape[2]:  # DeepSeek V4
        raise _Uncountable(f"cannot count FLOPs of {module.config.model_type}: it compresses keys")
    sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    kinds = getattr(module.config, "layer_types", None) or ()
    is_chunked = _CHUNKED in kinds and kinds[module.layer_idx] == _CHUNKED
    chunk = module.config.attention_chunk_size if is_chunked else None
    _calls.get().append(_AttentionCall(*sizes, options.get("sliding_window") or None, chunk))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(_COUNTING, _record_attention)

# While tracing, which takes longer, transformers does not look at values, for example for padding. Some
# families do not use its attention interface, or need its masks.
_tracing = partial(FakeTensorMode, allow_non_fake_inputs=True)
_ATTEMPTS: tuple[tuple[str, Callable[[], AbstractContextManager[Any]]], ...] = (
    (_COUNTING, nullcontext),
    (_COUNTING, _tracing),
    ("eager", _tracing),
)


def _count(text: Any, patch: int, reduce: Callable[[Any], None] | None) -> ModelShape:
    length = getattr(text, "mamba_chunk_size", None) or getattr(text, "chunk_size", None) or _LENGTH
    model, layers, calls, one, two = _run_twice(text, length, reduce)

    def per_token(part: str) -> tuple[int, int]:
        """Solve linear * tokens + quadratic * tokens**2 for both coefficients."""
        quadratic = (two[part] - 2 * one[part]) // (2 * length**2)
        if quadratic < 0 and 2 * one[part] - two[part] > 1e-3 * two[part]:
            raise SoloError(f"cannot count FLOPs of {text.model_type}: they do not grow with the length")
        quadratic = max(quadratic, 0)  # linear attention of some families has a small constant
        return (one[part] - quadratic * length**2) // length, quadratic

    projections, own_attention = per_token("projections")
    mlp, own_in_mlp = per_token("mlp")  # Zamba's shared block
    own_attention += own_in_mlp
    (last, _), (experts, _) = map(per_token, ("last", "experts"))
    attention = [call.layer for call in calls]
    sizes = calls or [_declared_attention(text)]
    linear_sizes: Counter[str] = Counter()
    for name, module in model.base_model.named_modules():
        if isinstance(module, _LINEAR):
            linear_sizes[name.rpartition(".")[2]] += sum(module.weight.shape)
    counts = _parameters(model, layers, patch)
    routed = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    return ModelShape(
        hidden=text.hidden_size,
        layers=len(layers),
        vocabulary=text.vocab_size,
        patch=patch,
        tied=counts.head == 0,
        key_heads=sizes[0].key_heads,
        query=_mean(call.heads * (call.key_dim + call.value_dim) / 2 for call in sizes),
        key=_mean(call.key_heads * (call.key_dim + call.value_dim) / 2 for call in sizes),
        mlp=(mlp // (6 * text.hidden_size) if routed else one["width"]) // len(layers),
        attention=(*attention, *([AttentionLayer(own_attention)] if own_attention else ())),
        projection_flops=projections,
        mlp_flops=mlp,
        last_flops=last,
        linear_sizes=linear_sizes,
        active_parameters=counts.total - routed + experts // 2,
        parameters=counts,
    )


def _run_twice(
    text: Any, length: int, reduce: Callable[[Any], None] | None
) -> tuple[Any, list[nn.Module], list[_AttentionCall], Counter[str], Counter[str]]:
    """Run a model on `length` and 2 * `length` tokens; return it, its layers, and results of `_run`."""
    failure: SoloError | None = None
    for attention, mode in _ATTEMPTS:
        try:
            model = _build(text, attention)
            if reduce:
                reduce(model)
            layers = decoder_layers(model)
            if not layers:
                raise SoloError(f"cannot count {text.model_type}: its decoder has no list of layers")
            calls, one = _run(model, layers, length, mode())
            _, two = _run(model, layers, 2 * length, mode())
        except _Uncountable:
            raise
        except SoloError as error:
            failure = error
        else:
            return model, layers, calls, one, two
    assert failure is not None
    raise failure


def build_without_weights(text: Any, attention: str, **implementations: str) -> Any:
    """Build a causal language model on the meta device, which does not look for padding among its tokens.

    Args:
        attention: Implementation of attention.
        **implementations: Those of other layers.

    Raises:
        SoloError: transformers has no such model, or cannot build it.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if kind is None:
        raise SoloError(f"cannot count {text.model_type}: it is not a causal language model of transformers")
    text = copy.deepcopy(text)
    with suppress(Exception):  # else some families look for padding among the values of the tokens
        text.pad_token_id = None
    try:
        # Initialization must not advance the random state of a run.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForCausalLM.from_config(text, attn_implementation=attention, **implementations)
    except Exception as error:  # code of any family, or of a model's own
        raise SoloError(f"cannot count {text.model_type}: {first_line(error)}") from error


def _build(text: Any, attention: str) -> Any:
    """Build a model that computes the experts that tokens are routed to, without looking at values."""
    model = build_without_weights(text, attention, experts_implementation=_EXPERTS).eval()
    for name, module in model.named_modules():
        if name.endswith(".experts") and not hasattr(type(module).forward, "__wrapped__"):
            module.forward = partial(_compute_routed, module, text)  # its class takes no implementation
    return model


def _compute_routed(
    experts: Any, text: Any, hidden: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Compute a product of the FLOPs of the experts that tokens are routed to.

    For families whose own code depends on the values of tokens (DBRX), or computes all experts (Llama 4).
    """
    if chosen is None:  # each token comes once per expert
        rows = hidden.numel() // hidden.shape[-1] // experts.num_experts * text.num_experts_per_tok
    else:
        rows = chosen.numel()
    per_expert = sum(
        weight.numel() // (len(weight) if weight.ndim == 3 else experts.num_experts)
        for weight in experts.parameters()
    )
    torch.mm(hidden.new_empty(rows, per_expert), hidden.new_empty(per_expert, 1))
    return hidden


def _run(
    model: Any, layers: list[nn.Module], length: int, mode: AbstractContextManager[Any]
) -> tuple[list[_AttentionCall], Counter[str]]:
    """Run one forward pass on the meta device; return its attention calls, and its other FLOPs by part."""
    names = {module: f"{type(model).__name__}.{name}" for name, module in model.named_modules()}
    last: dict[nn.Module, nn.Module] = {}
    hooks = [
        leaf.register_forward_hook(lambda leaf, *_, layer=layer: last.__setitem__(layer, leaf))
        for layer in layers
        for leaf in layer.modules()
        if not list(leaf.children()) and not isinstance(leaf, _PASS_THROUGH)
    ]
    widths: list[int] = []
    hooks += [
        # Before what other hooks leave of the input.
        leaf.register_forward_pre_hook(lambda leaf, args: widths.append(args[0].shape[-1]), prepend=True)
        for layer in layers
        for name, child in layer.named_children()
        if not _MIXER.search(name)
        for leaf in child.modules()
        if isinstance(leaf, _LINEAR) and _out_features(leaf) == model.config.hidden_size
    ]
    calls: list[_AttentionCall] = []
    token = _calls.set(calls)
    try:
        with torch.no_grad(), torch.device("meta"), mode, FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    except _Uncountable:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise SoloError(
            f"cannot count FLOPs of {model.config.model_type}: they depend on the values of tokens"
        ) from error
    except Exception as error:
        raise SoloError(f"cannot count FLOPs of {model.config.model_type}: {first_line(error)}") from error
    finally:
        _calls.reset(token)
        for hook in hooks:
            hook.remove()
    counted = counter.get_flop_counts()

    def flops(modules: Iterable[nn.Module]) -> int:
        return sum(sum(counted.get(names[module], {}).values()) for module in modules)

    rotary = [module for module in names if "Rotary" in type(module).__name__]
    mlp = flops(
        child for layer in layers for name, child in layer.named_children() if not _MIXER.search(name)
    )
    head = flops([model.get_output_embeddings()])
    parts = {
        "projections": counter.get_total_flops() - mlp - head - flops(rotary),
        "mlp": mlp,
        "last": flops(leaf for leaf in last.values() if isinstance(leaf, _LINEAR)),
        "experts": flops(module for module, name in names.items() if name.endswith(".experts")),
        "width": sum(widths),
    }
    return calls, Counter(parts)


def _parameters(model: Any, layers: list[nn.Module], patch: int) -> ParameterCounts:
    parts: Counter[str] = Counter()
    head = model.get_output_embeddings()
    of_layer = {
        id(weight): "attention" if _MIXER.search(name) else "mlp"
        for layer in layers
        for name, child in layer.named_children()
        for weight in child.parameters()
    }
    norms = {id(weight) for module in model.modules() if _is_norm(module) for weight in module.parameters()}
    heads = {id(weight) for weight in head.parameters()} - {
        id(weight) for weight in model.get_input_embeddings().parameters()
    }
    for weight in model.parameters():
        part = "norms" if id(weight) in norms else "head" if id(weight) in heads else "embedding"
        parts[part if part != "embedding" else of_layer.get(id(weight), part)] += weight.numel()
    counted = {part: parts[part] for part in ("embedding", "attention", "mlp", "norms", "head")}
    return ParameterCounts(patch_embedding=patch * model.config.hidden_size, **counted)


def _declared_attention(text: Any) -> _AttentionCall:
    """Return the sizes of the configuration, for families whose attention is not recorded."""
    heads = getattr(text, "num_attention_heads", None)
    if not heads:  # Mamba
        return _AttentionCall(0, 0, 0, 0)
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return _AttentionCall(heads, getattr(text, "num_key_value_heads", None) or heads, dim, dim)


def _out_features(module: nn.Module) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features  # type: ignore[return-value]


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _mean(values: Iterable[float]) -> int:
    return round(statistics.fmean(values))
