"""Published accelerator specifications, and the memory per device that a run needs.

Weights, gradients and moments are exact except for padding. What layers keep for the backward pass is
measured (`estimate/activations.py`). Not counted: the CUDA context (about 0.5 GiB), NCCL buffers and
fragmentation. torch.compile saves less.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

import torch
from transformers import PreTrainedConfig

from solo_vlm.models.flops import ModelShape
from solo_vlm.models.solo.modeling_solo import CHUNK_SIZE
from solo_vlm.train.activation_checkpointing import LayerModes
from solo_vlm.train.estimate.layout import Layout, layer_weights, outside_weights
from solo_vlm.train.optimizer import BLOCK_SIZE
from solo_vlm.train.parallel.context import DistributedContext, ParallelDims
from solo_vlm.train.parallel.sharding import layers_per_fsdp_unit
from solo_vlm.train.recipe import LoraSettings, Recipe
from solo_vlm.utils.errors import SoloError

_GIB = 2**30
_TERA = 10**12
_FLOAT32 = 4  # bytes
_NEW_TOKENS = 4  # <vpatch>, <vision>, <vrow_sep>, </vision>
USABLE = 0.9
"""Share of a device's memory that may be planned; the rest is for what is not counted here."""

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


def device_memory(context: DistributedContext) -> int | None:
    """Return the memory of the smallest device of a run in bytes; None where it is main memory."""
    if context.device.type != "cuda":
        return None
    return -context.max(-torch.cuda.get_device_properties(context.device).total_memory)


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


def memory_per_device(layout: Layout, recipe: Recipe) -> Memory:
    """Return the memory per device.

    With adapters or a frozen decoder the activations are an upper bound, because inputs of frozen layers need
    not be saved.
    """
    compute, dims, layers = compute_bytes(recipe), layout.dims, layout.shape.layers
    layer, outside = layer_weights(layout.own), outside_weights(layout.own)
    whole = layers * layer + outside
    weights = _FLOAT32 * whole / dims.shards
    unit = layers_per_fsdp_unit(layers, round(layer_weights(layout.shape)))
    layers_gathered = min(2 * unit, layers) if recipe.parallel.reshard else layers
    gathered = compute * (layers_gathered * layer + outside)
    if recipe.quantize:
        weights, gathered = _NF4 * layers * layer + _FLOAT32 * outside, 0
    trained, waiting = whole, unit * layer + outside
    if recipe.lora or recipe.trainable != "all":
        trained = waiting = trained_parameters(layout.shape, recipe)
    if recipe.parallel.defer_reduction and dims.gradient_accumulation_steps > 1:
        waiting = trained
    return Memory(
        weights=round(weights),
        gradients=round(_FLOAT32 * trained / dims.shards),
        optimizer=round(_optimizer_bytes(layout, recipe) / dims.shards),
        gathered=round(gathered + (compute + _FLOAT32) * waiting),
        activations=peak_activations(layout, recipe),
    )


def kept_activations(layout: Layout, recipe: Recipe) -> int:
    """Return the bytes saved for the backward pass of one packed sequence.

    An upper bound: every token counts as a patch and as supervised.
    """
    layers = zip(layout.activations.layers(layout.tokens), layout.modes.layers, strict=True)
    return round(_kept_outside(layout, recipe) + sum(kept[mode] for kept, mode in layers))


def peak_activations(layout: Layout, recipe: Recipe) -> int:
    """Return the bytes of activations at the peak of the backward pass, with its working memory.

    The peak is in the loss or in a layer: the pass has freed the activations of the layers behind it.
    """
    tokens, own = layout.tokens, layout.own
    # Gradients of the gate, the up projection and their product, which itself is freed by then.
    gradients = 2 * tokens * compute_bytes(recipe) * own.mlp
    held, peak = _kept_outside(layout, recipe), 0.0
    for kept, mode in zip(layout.activations.layers(tokens), layout.modes.layers, strict=True):
        held += kept[mode]
        peak = max(peak, held + kept["none"] - kept[mode] + gradients)
    loss = 3 * _FLOAT32 * min(CHUNK_SIZE, tokens) * own.vocabulary  # logits, softmax, gradient
    return round(max(peak, held + loss))


def plan_layout(
    config: PreTrainedConfig,
    recipe: Recipe,
    dims: ParallelDims,
    memory: int | None,
    known: Layout | None = None,
) -> Layout:
    """Count a model on the processes of a run, and choose its activation checkpointing if that is "auto".

    Args:
        memory: Memory of a device in bytes; None where it is main memory: then nothing is recomputed.
        known: See `Layout.of`.

    Raises:
        SoloError: See `ModelShape.of`; or what the model's layers keep is not known.
    """
    if recipe.activation_checkpointing != "auto":
        return Layout.of(config, recipe, dims, known)
    try:
        layout = Layout.of(config, recipe, dims, known)
        if memory is None:
            return replace(layout, modes=LayerModes(none=layout.shape.layers))
        layout.activations.require_linear(layout.tokens)
    except SoloError as error:
        raise SoloError(
            f"activation_checkpointing = auto: {error}; set it to full, selective or none"
        ) from error
    return replace(layout, modes=_fit_modes(layout, recipe, memory))


def _fit_modes(layout: Layout, recipe: Recipe, memory: int) -> LayerModes:
    """Return the least recomputation that fits.

    As many layers as fit are "selective", which saves the most time per byte; only if all are, as many as fit
    keep everything. If not even "full" checkpointing fits, all layers have it.
    """
    layers = layout.shape.layers

    def fits(modes: LayerModes) -> bool:
        return memory_per_device(replace(layout, modes=modes), recipe).total <= USABLE * memory

    least_first = [LayerModes(selective=layers - count, none=count) for count in range(layers, -1, -1)]
    least_first += [LayerModes(full=count, selective=layers - count) for count in range(1, layers)]
    return next(filter(fits, least_first), LayerModes(full=layers))


def describe_modes(layout: Layout, recipe: Recipe, memory: int | None) -> str:
    """Describe the activation checkpointing of the layers, with the memory that it is chosen for."""
    text = f"activation checkpointing: {layout.modes}"
    if memory is None:
        return text
    total = memory_per_device(layout, recipe).total
    return f"{text}; estimated {total / _GIB:.1f} of {memory / _GIB:.4g} GiB"


def trained_parameters(shape: ModelShape, recipe: Recipe) -> int:
    """Return the number of trainable parameters, including adapters."""
    counts = shape.parameters
    if recipe.trainable == "all" and recipe.lora is None:
        return counts.total
    rows = _NEW_TOKENS * shape.hidden * (1 if shape.tied else 2) if recipe.trainable == "new_tokens" else 0
    adapters = _adapter_weights(shape, recipe.lora) if recipe.lora else 0
    return counts.patch_embedding + rows + adapters


def _optimizer_bytes(layout: Layout, recipe: Recipe) -> float:
    """Return the bytes of the optimizer's state on the processes that hold the model once."""
    counts, name = layout.own.parameters, recipe.optimizer.name
    matrices, trained = counts.attention + counts.mlp, counts.total
    if recipe.lora or recipe.trainable != "all":
        trained = trained_parameters(layout.shape, recipe)
        matrices = _adapter_weights(layout.shape, recipe.lora) if recipe.lora else 0
    elif name == "muon" and layout.own.active_parameters < counts.total:
        matrices = counts.attention  # experts are not the weights of linear layers
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


def _kept_outside(layout: Layout, recipe: Recipe) -> float:
    """Return the bytes of a sequence that are saved outside layers, by the decoder and around it."""
    compute, own = compute_bytes(recipe), layout.own
    # Hidden states at supervised tokens; patches as bytes, and normalized.
    around = compute * own.hidden + (1 + compute) * own.patch
    return layout.activations.outside(layout.tokens) + layout.tokens * around


def compute_bytes(recipe: Recipe) -> int:
    """Return the bytes of a value in the compute precision."""
    return 2 if recipe.precision == "bf16" else _FLOAT32
