"""Memory of one device in training, by part, from the model's shape and the recipe alone.

Weights, gradients and moments are exact but for padding. Activations are counted tensor by tensor, as
PyTorch keeps them for the backward pass of transformers' decoders. The method is that of Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models", section 4, with what differs here:
attention that keeps no scores (flash), gated MLPs, grouped queries, RMS norms in float32, no dropout, and a
loss in chunks. Not counted are the CUDA context (about half a GiB), buffers of NCCL and fragmentation. With
torch.compile less is kept; with attention that keeps its scores (Gemma 2's eager one) far more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from solo_vlm.models.flops import ModelShape
from solo_vlm.models.solo.loss_solo import CHUNK_SIZE
from solo_vlm.train.parallel.layout import Layout, layers_at_once
from solo_vlm.train.recipe import LoraSettings, Recipe

_FLOAT32 = 4  # bytes
_NEW_TOKENS = 4  # <vpatch>, <vision>, <vrow_sep>, </vision>
_NF4 = 0.5 + 0.127 / 8  # with constants that are quantised themselves: Dettmers et al. 2023, section 3


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        weights: its share of the parameters in float32; of a quantised decoder all, in 4 bits.
        gradients: its share, in float32.
        optimizer: its share of Adam's two moments, in float32.
        gathered: what is whole for a while. In the precision of the computation: the weights of two units of
            layers (`layers_at_once`; the next one is gathered ahead; without `parallel.reshard`, of all), and
            those outside of layers. And the gradients of one unit, and of what is outside, on their way to
            be summed.
        activations: what the forward pass keeps for the backward pass, and the most that the backward pass
            of one layer, or of one chunk of the loss, needs besides.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


def memory_per_device(shape: ModelShape, recipe: Recipe, layout: Layout) -> Memory:
    """Memory of each device; see `Memory`.

    With adapters or a frozen decoder the activations are an upper bound: inputs of a frozen layer need not
    be kept.
    """
    compute = _compute_bytes(recipe)
    layer, outside = _layer_weights(shape, layout.tensor), _outside_weights(shape)
    whole = shape.layers * layer + outside
    weights = _FLOAT32 * whole / layout.data
    unit = layers_at_once(shape.layers, round(_layer_weights(shape)))
    layers_gathered = min(2 * unit, shape.layers) if recipe.parallel.reshard else shape.layers
    gathered = compute * (layers_gathered * layer + outside)
    if recipe.quantize:
        weights, gathered = _NF4 * shape.layers * layer + _FLOAT32 * outside, 0
    trained, waiting = whole, unit * layer + outside
    if recipe.lora or recipe.trainable != "all":
        trained = waiting = trained_parameters(shape, recipe)
    return Memory(
        weights=round(weights),
        gradients=round(_FLOAT32 * trained / layout.data),
        optimizer=round(2 * _FLOAT32 * trained / layout.data),
        gathered=round(gathered + (compute + _FLOAT32) * waiting),
        activations=kept_activations(shape, recipe, layout) + _working_activations(shape, recipe, layout),
    )


def kept_activations(shape: ModelShape, recipe: Recipe, layout: Layout) -> int:
    """Bytes that the forward pass over one packed sequence keeps for the backward pass.

    Every token may be a patch, and every one may have a label: this is the most that can be.
    """
    compute = _compute_bytes(recipe)
    layer = _kept_of_layer(shape, recipe, layout)
    # The last norm, and the hidden states at labels; patches as bytes, and normalised.
    ends = (_FLOAT32 + 2 * compute) * shape.hidden + (1 + compute) * shape.patch
    return round(recipe.data.sequence_length * (shape.layers * layer + ends))


def trained_parameters(shape: ModelShape, recipe: Recipe) -> int:
    """How many parameters the recipe trains, adapters included."""
    counts = shape.parameters
    if recipe.trainable == "all" and recipe.lora is None:
        return counts.total
    rows = _NEW_TOKENS * shape.hidden * (1 if shape.tied else 2) if recipe.trainable == "new_tokens" else 0
    adapters = _adapter_weights(shape, recipe.lora) if recipe.lora else 0
    return counts.patch_embedding + rows + adapters


def _adapter_weights(shape: ModelShape, lora: LoraSettings) -> int:
    sizes = shape.linear_sizes
    targets: Iterable[str] = sizes if lora.targets == "all-linear" else lora.targets
    return lora.rank * sum(sizes.get(target, 0) for target in targets)


def _layer_weights(shape: ModelShape, tensor: int = 1) -> float:
    """Of one layer after tensor parallelism has split its matrices; its norms are whole everywhere."""
    counts = shape.parameters
    matrices, norms = counts.attention + counts.mlp, counts.norms - shape.hidden  # without the last norm
    return (matrices / tensor + norms) / shape.layers


def _outside_weights(shape: ModelShape) -> int:
    counts = shape.parameters
    return counts.embedding + counts.patch_embedding + counts.head + shape.hidden


def _working_activations(shape: ModelShape, recipe: Recipe, layout: Layout) -> int:
    """Bytes of the backward pass of one layer, or of a chunk of the loss, whichever is more."""
    compute, tokens = _compute_bytes(recipe), recipe.data.sequence_length
    recomputed = _all_of_layer(shape, layout, compute) - _kept_of_layer(shape, recipe, layout)
    # Gradients of the gate, of what it lets through, and of their product, which itself is free by then.
    gradients = 2 * compute * shape.mlp / layout.tensor
    logits = min(CHUNK_SIZE, tokens) * shape.vocabulary
    loss = 3 * _FLOAT32 * logits  # logits, their softmax, their gradient
    return round(max(tokens * (recomputed + gradients), loss))


def _kept_of_layer(shape: ModelShape, recipe: Recipe, layout: Layout) -> float:
    """Bytes a token that one layer keeps until the backward pass comes to it."""
    compute = _compute_bytes(recipe)
    if recipe.activation_checkpointing == "none":
        return _all_of_layer(shape, layout, compute)
    if recipe.activation_checkpointing == "selective":
        return _products_of_layer(shape, layout, compute)
    return compute * shape.hidden  # its input


def _all_of_layer(shape: ModelShape, layout: Layout, compute: int) -> float:
    """Bytes a token of everything in a layer that its backward pass needs."""
    # A norm keeps its input in float32, and the result before its weights; a layer before which it stands
    # keeps the result after them.
    norms = shape.norms * (_FLOAT32 + compute) * shape.hidden + 2 * compute * shape.hidden
    head_norms = (_FLOAT32 + compute) * (shape.query + shape.key) if shape.head_norms else 0
    # Queries, keys, values, the result, and one sum a head.
    attention = 2 * compute * (shape.query + shape.key) + _FLOAT32 * shape.heads
    # Gate before and after its activation, what it lets through, and their product.
    mlp = 4 * compute * shape.mlp
    return norms + (head_norms + attention + mlp) / layout.tensor


def _products_of_layer(shape: ModelShape, layout: Layout, compute: int) -> float:
    """Bytes a token of a layer's input, and the results of its matrix products and its attention."""
    projected = compute * (2 * shape.query + 2 * shape.key) + _FLOAT32 * shape.heads
    mlp = 2 * compute * shape.mlp
    return 3 * compute * shape.hidden + (projected + mlp) / layout.tensor


def _compute_bytes(recipe: Recipe) -> int:
    return 2 if recipe.precision == "bf16" else _FLOAT32
