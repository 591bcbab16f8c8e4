"""Published accelerator specifications, and the memory per device that a run needs.

Weights, gradients and moments are exact except for padding. Activations are counted tensor by tensor, as
PyTorch saves them for the backward pass of transformers' decoders, by the method of Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4, adapted to flash attention, gated
MLPs, grouped queries, RMS norms in float32, no dropout, and a chunked loss. Not counted: the CUDA context
(about 0.5 GiB), NCCL buffers and fragmentation. torch.compile saves less; attention that saves its scores
(eager attention) saves far more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from solo_vlm.models.flops import ModelShape
from solo_vlm.models.solo.modeling_solo import CHUNK_SIZE
from solo_vlm.train.optimizer import BLOCK_SIZE
from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.train.parallel.sharding import layers_per_fsdp_unit
from solo_vlm.train.parallel.vocabulary import can_split_head
from solo_vlm.train.recipe import LoraSettings, Recipe
from solo_vlm.utils.errors import SoloError

_GIB = 2**30
_TERA = 10**12
_FLOAT32 = 4  # bytes
_NEW_TOKENS = 4  # <vpatch>, <vision>, <vrow_sep>, </vision>
_NF4 = 0.5 + 0.127 / 8  # with double quantization: Dettmers et al. 2023, section 3


@dataclass(frozen=True)
class Device:
    """Published specifications of an accelerator.

    Attributes:
        memory: Memory in bytes.
        peak_flops: FLOPs per second of dense bfloat16 matrix products with float32 accumulation.
    """

    name: str
    memory: int
    peak_flops: float


def _device(name: str, gibibytes: float, teraflops: float) -> Device:
    return Device(name, round(gibibytes * _GIB), teraflops * _TERA)


# Without sparsity, for which data sheets give twice the FLOPs. Sources: NVIDIA's data sheets of the A100,
# H100, H200, L4 and L40S; the appendices of its whitepapers on GA102 (RTX 3090), Ada (4090) and RTX
# Blackwell (5090). The L4 and the L40S have 24 and 48 GB, minus the share of error correction.
DEVICES = (
    _device("A100-40GB", 40, 312),
    _device("A100-80GB", 80, 312),
    _device("H100", 80, 989.4),
    _device("H100-PCIe", 80, 756),
    _device("H200", 141, 989.4),
    _device("L4", 22.5, 121),
    _device("L40S", 45, 362),
    _device("RTX-3090", 24, 71),
    _device("RTX-4090", 24, 165.2),
    _device("RTX-5090", 32, 209.5),
)


def find_device(name: str) -> Device:
    """Look up a device by name, ignoring case and punctuation."""
    for device in DEVICES:
        if _words(device.name) == _words(name):
            return device
    raise SoloError(f"unknown device {name}: known are {', '.join(device.name for device in DEVICES)}")


def recognize_device(name: str) -> Device | None:
    """Look up a device by torch's name for it, such as "NVIDIA H100 80GB HBM3"; None if it is unknown."""
    words = _words(name)
    fitting = [device for device in DEVICES if _words(device.name) <= words]
    return max(fitting, key=lambda device: len(device.name), default=None)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


@dataclass(frozen=True)
class Memory:
    """Memory per device, in bytes.

    Attributes:
        weights: Shard of the parameters in float32, or a complete decoder in 4 bits.
        gradients: Shard of the gradients in float32.
        optimizer: Shard of the optimizer's state. What Muon gathers for its step is not counted: the
            activations are free by then.
        gathered: Temporarily unsharded tensors: weights, in the compute precision, of two FSDP units
            (`layers_per_fsdp_unit`; the next one is prefetched) or, without `parallel.reshard`, of all, and
            those outside layers; gradients of one unit and of those, before they are reduced, or with
            `parallel.defer_reduction` of all.
        activations: Activations saved for the backward pass, and the peak working memory of the backward
            pass of one layer or one chunk of the loss.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """Total bytes."""
        return sum(astuple(self))


def memory_per_device(shape: ModelShape, recipe: Recipe, dims: ParallelDims) -> Memory:
    """Return the memory per device.

    With adapters or a frozen decoder the activations are an upper bound, because inputs of frozen layers need
    not be saved.
    """
    compute = compute_bytes(recipe)
    layer, outside = layer_weights(shape, dims.tp), outside_weights(shape, dims.tp)
    whole = shape.layers * layer + outside
    weights = _FLOAT32 * whole / dims.shards
    unit = layers_per_fsdp_unit(shape.layers, round(layer_weights(shape)))
    layers_gathered = min(2 * unit, shape.layers) if recipe.parallel.reshard else shape.layers
    gathered = compute * (layers_gathered * layer + outside)
    if recipe.quantize:
        weights, gathered = _NF4 * shape.layers * layer + _FLOAT32 * outside, 0
    trained, waiting = whole, unit * layer + outside
    if recipe.lora or recipe.trainable != "all":
        trained = waiting = trained_parameters(shape, recipe)
    if recipe.parallel.defer_reduction and dims.gradient_accumulation_steps > 1:
        waiting = trained
    return Memory(
        weights=round(weights),
        gradients=round(_FLOAT32 * trained / dims.shards),
        optimizer=round(_optimizer_bytes(shape, recipe, dims.tp) / dims.shards),
        gathered=round(gathered + (compute + _FLOAT32) * waiting),
        activations=kept_activations(shape, recipe, dims) + _working_activations(shape, recipe, dims),
    )


def kept_activations(shape: ModelShape, recipe: Recipe, dims: ParallelDims) -> int:
    """Return the bytes saved for the backward pass of one packed sequence.

    An upper bound: every token counts as a patch and as supervised.
    """
    compute = compute_bytes(recipe)
    layer = _kept_of_layer(shape, recipe, dims)
    # The last norm, and the hidden states at supervised tokens; patches as bytes, and normalized.
    ends = (_FLOAT32 + 2 * compute) * shape.hidden + (1 + compute) * shape.patch
    return round(recipe.data.sequence_length / dims.cp * (shape.layers * layer + ends))


def trained_parameters(shape: ModelShape, recipe: Recipe) -> int:
    """Return the number of trainable parameters, including adapters."""
    counts = shape.parameters
    if recipe.trainable == "all" and recipe.lora is None:
        return counts.total
    rows = _NEW_TOKENS * shape.hidden * (1 if shape.tied else 2) if recipe.trainable == "new_tokens" else 0
    adapters = _adapter_weights(shape, recipe.lora) if recipe.lora else 0
    return counts.patch_embedding + rows + adapters


def _optimizer_bytes(shape: ModelShape, recipe: Recipe, tensor: int) -> float:
    """Return the bytes of the optimizer's state on the processes that hold the model once."""
    counts, name = shape.parameters, recipe.optimizer.name
    matrices = float(counts.attention + counts.mlp)
    trained = shape.layers * layer_weights(shape, tensor) + outside_weights(shape, tensor)
    if recipe.lora or recipe.trainable != "all":
        trained = trained_parameters(shape, recipe)
        matrices = _adapter_weights(shape, recipe.lora) if recipe.lora else 0
    elif name == "muon" and shape.active_parameters < counts.total:
        matrices = counts.attention  # experts are not the weights of linear layers
    matrices /= tensor
    of_matrix, of_other = {
        "adamw": (2 * _FLOAT32, 2 * _FLOAT32),
        "adamw_bf16": (4, 4),
        "adamw_8bit": (2 + 2 * _FLOAT32 / BLOCK_SIZE, 2 * _FLOAT32),
        "muon": (_FLOAT32, 2 * _FLOAT32),
    }[name]
    return of_matrix * matrices + of_other * (trained - matrices)


def _adapter_weights(shape: ModelShape, lora: LoraSettings) -> int:
    sizes = shape.linear_sizes
    targets: Iterable[str] = sizes if lora.targets == "all-linear" else lora.targets
    return lora.rank * sum(sizes.get(target, 0) for target in targets)


def layer_weights(shape: ModelShape, tensor: int = 1) -> float:
    """Return the parameters of one layer per tensor-parallel process; norms are replicated."""
    counts = shape.parameters
    matrices, norms = counts.attention + counts.mlp, counts.norms - shape.hidden  # without the last norm
    return (matrices / tensor + norms) / shape.layers


def outside_weights(shape: ModelShape, tensor: int = 1) -> int:
    """Return the parameters outside layers per tensor-parallel process."""
    counts = shape.parameters
    return counts.embedding + counts.patch_embedding + head_weights(shape, tensor) + shape.hidden


def head_weights(shape: ModelShape, tensor: int) -> int:
    """Return the parameters of the head per tensor-parallel process; a plain LLM's is not split."""
    is_split = shape.patch > 0 and can_split_head(shape.vocabulary, shape.tied, tensor)
    return shape.parameters.head // tensor if is_split else shape.parameters.head


def _working_activations(shape: ModelShape, recipe: Recipe, dims: ParallelDims) -> int:
    """Return the working bytes of the backward pass: the maximum of one layer and one loss chunk."""
    compute, tokens = compute_bytes(recipe), recipe.data.sequence_length // dims.cp
    recomputed = _all_of_layer(shape, dims, compute) - _kept_of_layer(shape, recipe, dims)
    # Gradients of the gate, the up projection and their product, which itself is freed by then.
    gradients = 2 * compute * shape.mlp / dims.tp
    logits = min(CHUNK_SIZE, tokens) * shape.vocabulary
    if shape.patch and can_split_head(shape.vocabulary, shape.tied, dims.tp):
        logits //= dims.tp
    loss = 3 * _FLOAT32 * logits  # logits, softmax, gradient
    return round(max(tokens * (recomputed + gradients), loss))


def _kept_of_layer(shape: ModelShape, recipe: Recipe, dims: ParallelDims) -> float:
    """Return the bytes per token that one layer saves for its backward pass."""
    compute = compute_bytes(recipe)
    if recipe.activation_checkpointing == "none":
        return _all_of_layer(shape, dims, compute)
    if recipe.activation_checkpointing == "selective":
        return _products_of_layer(shape, dims, compute)
    return compute * shape.hidden  # its input


def _all_of_layer(shape: ModelShape, dims: ParallelDims, compute: int) -> float:
    """Return the bytes per token of everything that a layer's backward pass needs."""
    # A norm saves its input in float32 and its result before scaling; the next layer saves the scaled result.
    norms = shape.norms * (_FLOAT32 + compute) * shape.hidden + 2 * compute * shape.hidden
    head_norms = (_FLOAT32 + compute) * (shape.query + shape.key) if shape.head_norms else 0
    # Queries, keys, values, the result, and one log-sum-exp per head.
    attention = 2 * compute * (shape.query + shape.key) + _FLOAT32 * shape.heads
    # Gate before and after its activation, up projection, and their product.
    mlp = 4 * compute * shape.mlp
    return norms + (head_norms + attention + mlp) / dims.tp


def _products_of_layer(shape: ModelShape, dims: ParallelDims, compute: int) -> float:
    """Return the bytes per token of a layer's input and of its matrix products and attention."""
    projected = compute * (2 * shape.query + 2 * shape.key) + _FLOAT32 * shape.heads
    mlp = 2 * compute * shape.mlp
    return 3 * compute * shape.hidden + (projected + mlp) / dims.tp


def compute_bytes(recipe: Recipe) -> int:
    """Return the bytes of a value in the compute precision."""
    return 2 if recipe.precision == "bf16" else _FLOAT32
