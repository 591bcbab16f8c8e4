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
from dataclasses import astuple, dataclass, replace

import torch
from transformers import PreTrainedConfig

from solo_vlm.models.flops import ModelShape
from solo_vlm.models.load import model_without_weights
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.solo.modeling_solo import CHUNK_SIZE
from solo_vlm.train.activation_checkpointing import MODES, LayerModes, Mode
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
    kept = _kept_of_modes(layout.own, compute_bytes(recipe))
    layers = sum(kept[mode] for mode in layout.modes.layers)
    return round(_tokens(layout, recipe) * (layers + _kept_outside(layout.own, compute_bytes(recipe))))


def peak_activations(layout: Layout, recipe: Recipe) -> int:
    """Return the bytes of activations at the peak of the backward pass, with its working memory.

    The peak is in the loss, or in the last layer of one of the modes: the pass has freed the activations of
    the layers behind it.
    """
    compute, tokens, own = compute_bytes(recipe), _tokens(layout, recipe), layout.own
    kept = _kept_of_modes(own, compute)
    # Gradients of the gate, the up projection and their product, which itself is freed by then.
    gradients = 2 * compute * own.mlp
    held, peak = _kept_outside(own, compute), 0.0
    for mode, count in zip(MODES, astuple(layout.modes), strict=True):
        held += count * kept[mode]
        if count:
            peak = max(peak, held + kept["none"] - kept[mode] + gradients)
    logits = min(CHUNK_SIZE, tokens) * own.vocabulary
    loss = 3 * _FLOAT32 * logits  # logits, softmax, gradient
    return round(max(tokens * peak, tokens * held + loss))


def plan_layout(
    config: PreTrainedConfig,
    recipe: Recipe,
    dims: ParallelDims,
    memory: int | None,
    shape: ModelShape | None = None,
) -> Layout:
    """Count a model on the processes of a run, and choose its activation checkpointing if that is "auto".

    Args:
        memory: Memory of a device in bytes; None where it is main memory: then nothing is recomputed.
        shape: The whole model, if it is counted already.

    Raises:
        SoloError: See `ModelShape.of`; or what the model's layers keep is not known.
    """
    if recipe.activation_checkpointing != "auto":
        return Layout.of(config, recipe, dims, shape)
    try:
        layout = Layout.of(config, recipe, dims, shape)
        if memory is None:
            return replace(layout, modes=LayerModes(none=layout.shape.layers))
        _require_known_activations(config, layout.shape)
    except SoloError as error:
        raise SoloError(
            f"activation_checkpointing = auto: {error}; set it to full, selective or none"
        ) from error
    return replace(layout, modes=_fit_modes(layout, recipe, memory))


def _require_known_activations(config: PreTrainedConfig, shape: ModelShape) -> None:
    """Raise SoloError if layers keep what is not counted here."""
    if shape.active_parameters < shape.parameters.total:
        raise SoloError("what experts keep depends on the tokens that are routed to them")
    for name, treatment in isolate_documents(model_without_weights(config)).items():
        if treatment != "packed attention":
            raise SoloError(f"what {name} keeps for the backward pass is not counted")


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


def _tokens(layout: Layout, recipe: Recipe) -> int:
    """Return the tokens of a packed sequence that one process computes."""
    return recipe.data.sequence_length // layout.dims.cp


def _kept_outside(own: ModelShape, compute: int) -> int:
    """Return the bytes per token that are saved outside layers."""
    # The last norm, and the hidden states at supervised tokens; patches as bytes, and normalized.
    return (_FLOAT32 + 2 * compute) * own.hidden + (1 + compute) * own.patch


def _kept_of_modes(own: ModelShape, compute: int) -> dict[Mode, float]:
    """Return the bytes per token that one layer saves for its backward pass, by mode."""
    return {
        "full": compute * own.hidden,  # its input
        "selective": _products_of_layer(own, compute),
        "none": _all_of_layer(own, compute),
    }


def _all_of_layer(own: ModelShape, compute: int) -> float:
    """Return the bytes per token of everything that a layer's backward pass needs."""
    # A norm saves its input in float32 and its result before scaling; the next layer saves the scaled result.
    norms = own.norms * (_FLOAT32 + compute) * own.hidden + 2 * compute * own.hidden
    head_norms = (_FLOAT32 + compute) * (own.query + own.key) if own.head_norms else 0
    # Queries, keys, values, the result, and one log-sum-exp per head.
    attention = 2 * compute * (own.query + own.key) + _FLOAT32 * own.heads
    # Gate before and after its activation, up projection, and their product.
    mlp = 4 * compute * own.mlp
    return norms + head_norms + attention + mlp


def _products_of_layer(own: ModelShape, compute: int) -> float:
    """Return the bytes per token of a layer's input and of its matrix products and attention."""
    projected = compute * (2 * own.query + 2 * own.key) + _FLOAT32 * own.heads
    return 3 * compute * own.hidden + projected + 2 * compute * own.mlp


def compute_bytes(recipe: Recipe) -> int:
    """Return the bytes of a value in the compute precision."""
    return 2 if recipe.precision == "bf16" else _FLOAT32
