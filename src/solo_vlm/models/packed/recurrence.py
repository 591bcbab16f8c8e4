"""Layers that carry state from token to token, computed for each document of a packed row from its start."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from solo_vlm.models.load import decoder_layers
from solo_vlm.models.packed.attention import PackedMask
from solo_vlm.models.packed.groups import IsolationError, document_groups
from solo_vlm.models.packed.kernels import Use, kernel_fault, row_arguments, takes_row_arguments
from solo_vlm.utils.errors import first_line

logger = logging.getLogger(__name__)

CACHES = {
    *("past_key_values", "past_key_value", "layer_past", "cache_params", "cache", "past", "state", "mems"),
    "use_cache",  # the layer itself holds it
}
"""Names of the argument that holds what a layer remembers of earlier tokens."""

_ROW = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class Documents(NamedTuple):
    """Documents of a packed row.

    Attributes:
        bounds: (documents + 1,) int64, cumulative document lengths.
        length: Tokens of the row.
        groups: The result of `document_groups` with and without padding, where a layer needs it.
        kernels: Uses of layers whose kernels take the whole row.
        images: (1, length) int64, image of each patch, -1 for text. None: images are read causally.
    """

    bounds: Tensor
    length: int
    groups: dict[bool, list[tuple[Tensor, Tensor]]]
    kernels: frozenset[Use] = frozenset()
    images: Tensor | None = None


class PackedRow:
    """The row that a model is computing, for layers that are not told.

    Attributes:
        treatments: Name of a layer's class to its treatment, see `isolate_documents`.
        config: Configuration of the decoder.
        attention: Attention implementation of the decoder before it was isolated.
        opens_images: Whether patches see later ones of their image.
        documents: None for an unpacked batch.
        attend_across: Attention of a process that has a slice of the row: called with attention over whole
            rows, and the slice's queries, keys, values and sinks. None: this process has the row.
    """

    def __init__(self, treatments: dict[str, Any], config: PreTrainedConfig) -> None:
        self.treatments = treatments
        self.opens_images = getattr(config, "image_attention", "causal") == "bidirectional"
        self.config = config = config.get_text_config()
        self.attention = config._attn_implementation
        self.documents: Documents | None = None
        self.attend_across: Callable[..., Tensor] | None = None
        self._pads: set[bool] = set()
        self._kernels: dict[Use, bool] = {}
        self._untried: dict[Use, nn.Module] = {}

    @property
    def bounds(self) -> Tensor | None:
        """Return the bounds of the documents."""
        return self.documents.bounds if self.documents else None

    @property
    def images(self) -> Tensor | None:
        """Return the image of each patch, (1, length) int64, -1 for text; None: images are read causally."""
        return self.documents.images if self.documents else None

    def use_groups(self, pad: bool) -> None:
        """Make the groups of each row to come, outside layers: a layer that runs again must do the same."""
        self._pads.add(pad)

    def follow(self, model: nn.Module) -> None:
        """Learn the documents of each batch that a model computes, in place."""
        forward = model.forward
        parameters = signature(forward).parameters

        @wraps(forward)
        def told(*args: Any, **kwargs: Any) -> Any:
            bounds = _document_bounds(**dict(zip(parameters, args, strict=False)), **kwargs)
            if bounds is not None and "use_cache" in parameters and len(args) < len(parameters):
                kwargs.setdefault("use_cache", False)
            if bounds is not None:
                groups = {pad: list(document_groups(bounds, pad)) for pad in self._pads}
                kernels = frozenset(use for use, is_exact in self._kernels.items() if is_exact)
                self.documents = Documents(bounds, int(bounds[-1]), groups, kernels)
            try:
                output = forward(*args, **kwargs)
            finally:
                self.documents = None
            self._try_kernels()
            return output

        model.forward = told  # type: ignore[method-assign]
        decoder: Any = getattr(model.base_model, "language_model", model.base_model)
        decoder.register_forward_pre_hook(self._learn_images, with_kwargs=True)
        for layer in decoder_layers(model):
            layer.register_forward_hook(self._restore_in_backward)

    def _learn_images(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the images for the layers, to which not every decoder passes its arguments."""
        if self.documents:
            self.documents = self.documents._replace(images=kwargs.get("image_index"))

    def has_kernels(self, layer: nn.Module, arguments: dict[str, Any]) -> bool:
        """Return whether the kernels of a layer take the current row; try unknown ones after it."""
        states = next((value for value in arguments.values() if _is_states(value)), None)
        if self.documents is None or states is None or not takes_row_arguments(layer):
            return False
        use = Use(type(layer), layer.training, states.dtype, states.device)
        if use not in self._kernels:
            self._untried.setdefault(use, layer)
        return use in self.documents.kernels and not any(
            isinstance(v, PackedMask) for v in arguments.values()
        )

    def _try_kernels(self) -> None:
        """Try new kernels, outside layers: one that runs again (checkpointing) must do the same."""
        while self._untried:
            use, layer = self._untried.popitem()
            try:
                fault = kernel_fault(layer, use, self.config, _in_groups_of)
            except Exception as failure:  # of any type, from kernels or from the code of any family
                fault = first_line(failure)
            self._kernels[use] = fault is None
            how = f"document by document: {fault}" if fault else "in one pass of its kernels"
            logger.info("%s computes packed rows %s", use.kind.__name__, how)

    def _restore_in_backward(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Let the documents be the same when a layer runs again in its backward pass (checkpointing)."""
        # Reentrant checkpointing in earlier versions of transformers, where this hook runs inside of it.
        is_forgotten = not torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in args
        )
        if is_forgotten and self.documents and set(self.treatments.values()) != {"packed attention"}:
            raise IsolationError(
                "reentrant checkpointing forgets the documents of a row; set use_reentrant=False"
            )
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(partial(self._restore, self.documents))

    def _restore(self, documents: Documents | None, gradient: Tensor) -> None:
        if self.documents is not documents:
            self.documents = documents
            # At the end of this backward pass.
            torch.autograd.Variable._execution_engine.queue_callback(self._forget)

    def _forget(self) -> None:
        self.documents = None


def _document_bounds(
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the bounds of a batch's documents, from positions that restart if they are not given."""
    if cu_seq_lens_q is not None:
        return cu_seq_lens_q.long()
    if position_ids is None or attention_mask is not None:
        return None
    positions = position_ids[0] if position_ids.ndim == 3 else position_ids  # of several axes
    restarts = positions.diff(dim=-1) != 1
    if not restarts.any():
        return None
    if len(positions) > 1:
        raise IsolationError(f"a packed row must be the only one of its batch, which has {len(positions)}")
    starts = restarts[0].nonzero()[:, 0] + 1
    return F.pad(F.pad(starts, (1, 0)), (0, 1), value=positions.shape[1])


def compute_apart(layer: nn.Module, row: PackedRow, attention: str | None = None, pad: bool = True) -> None:
    """Make a layer compute each document of a packed row as if it were alone, in place.

    Documents of similar length run as one batch, padded on the right, where causality hides the padding.
    Arguments of shape (1, length, ...) are cut like the hidden states, and a mask becomes that of a single
    document. Works for any layer that maps (batch, length, ...) to the same.

    Args:
        layer: Part of a decoder layer.
        row: The documents of the current row.
        attention: Attention implementation of transformers in the layer meanwhile, which takes dense masks.
        pad: Whether to batch documents of different lengths.
    """
    forward = layer.forward
    parameters = signature(forward).parameters
    row.use_groups(pad)

    @wraps(forward)
    @torch.compiler.disable
    def apart(*args: Any, **kwargs: Any) -> Any:
        if row.documents is None:
            return forward(*args, **kwargs)
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        _refuse_cache(arguments)
        if attention and "attention_mask" in arguments and arguments["attention_mask"] is None:
            raise IsolationError(
                "packed attention requires a mask; call isolate_documents after other changes"
            )
        for name in _ROW:
            arguments.pop(name, None)
        images = arguments.pop("image_index", row.images)
        if not attention and row.has_kernels(layer, arguments):
            return forward(**arguments, **row_arguments(row.documents.bounds, row.documents.length))
        with _using(layer, attention) if attention else nullcontext():
            return _in_groups(forward, arguments, row.documents.groups[pad], images, attention)

    layer.forward = apart  # type: ignore[method-assign]


def _in_groups(
    forward: Callable[..., Any],
    arguments: dict[str, Any],
    groups: list[tuple[Tensor, Tensor]],
    images: Tensor | None = None,
    attention: str | None = None,
) -> Any:
    """Compute a packed row in groups of documents."""
    positions = torch.cat([index[valid] for index, valid in groups])
    cut = partial(_cut, arguments, images, len(positions), attention)
    results = [(forward(**cut(index)), valid) for index, valid in groups]
    return _join(results, positions.argsort())


def _in_groups_of(forward: Callable[..., Any], arguments: dict[str, Any], bounds: Tensor) -> Any:
    return _in_groups(forward, arguments, list(document_groups(bounds)))


@contextmanager
def _using(layer: nn.Module, attention: str) -> Iterator[None]:
    """Give a layer, not the rest of its model, another attention implementation."""
    configs = [(part, part.config) for part in layer.modules() if hasattr(part, "config")]
    try:
        for part, config in configs:
            part.config = copy.copy(config)
            part.config._attn_implementation_internal = attention  # type: ignore[union-attr]
        yield
    finally:
        for part, config in configs:
            part.config = config


def _refuse_cache(arguments: dict[str, Any]) -> None:
    for name in CACHES & arguments.keys():
        if arguments[name] is not None and arguments[name] is not False:
            raise IsolationError(f"a packed row takes no cache, but {name} is given; set use_cache=False")


def close_mask(layer: nn.Module, row: PackedRow) -> None:
    """Make attention that takes a dense mask see only the document of each token, in place."""
    forward = layer.forward
    parameters = signature(forward).parameters

    @wraps(forward)
    @torch.compiler.disable
    def closed(*args: Any, **kwargs: Any) -> Any:
        if row.bounds is None:
            return forward(*args, **kwargs)
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        _refuse_cache(arguments)
        mask = _closed(arguments.get("attention_mask"), row.bounds, row.opens_images)
        return forward(**{**arguments, "attention_mask": mask})

    layer.forward = closed  # type: ignore[method-assign]


def _closed(mask: Any, bounds: Tensor, opens_images: bool = False) -> Tensor:
    """Return a (1, heads, length, length) mask, bool or added to scores, without other documents.

    Args:
        opens_images: Whether patches see later ones of their image.

    Raises:
        IsolationError: It is another kind of mask, or shows tokens what follows them.
    """
    length = int(bounds[-1])
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (length, length):
        raise IsolationError("cannot keep the documents of a packed row apart in a mask of this model's kind")
    token = torch.arange(length, device=mask.device)
    is_bool = mask.dtype == torch.bool
    hides = is_bool and bool(mask[..., 0, 0].all().logical_not())  # MPT: True where attention is not allowed
    sees = mask ^ hides if is_bool else mask > torch.finfo(mask.dtype).min / 2
    if not opens_images and sees[..., token[:, None] < token].any():
        raise IsolationError("packed training needs causal attention; this model's tokens see what follows")
    document = torch.bucketize(token, bounds[1:], right=True)
    is_other = document[:, None] != document
    return mask.masked_fill(is_other, hides if is_bool else torch.finfo(mask.dtype).min)


def _cut(
    arguments: dict[str, Any], images: Tensor | None, length: int, attention: str | None, index: Tensor
) -> dict[str, Any]:
    """Return a layer's arguments for a group of documents, whose tokens are `index`, (documents, longest)."""
    states = next((value for value in arguments.values() if _is_states(value)), None)
    if states is not None and states.shape[:2] != (1, length):
        raise IsolationError(f"states of shape {tuple(states.shape)} are no packed row of {length} tokens")
    dtype = torch.bool if attention == "sdpa" or states is None else states.dtype

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, PackedMask):
            return value.dense(index.shape, dtype, index.device, None if images is None else images[0, index])
        if isinstance(value, tuple | list):
            return [cut(name, item) for item in value]
        if isinstance(value, dict):
            return {key: cut(name, item) for key, item in value.items()}
        if not isinstance(value, Tensor) or length not in value.shape:
            return value
        if value.ndim == 4 and value.shape[-2:] == (length, length):  # a mask
            return value[0][:, index[:, :, None], index[:, None, :]].transpose(0, 1)
        for axis in range(value.ndim - 1):
            if value.shape[axis : axis + 2] == (1, length):
                return value.movedim((axis, axis + 1), (0, 1))[0, index].movedim((0, 1), (axis, axis + 1))
        raise IsolationError(
            f"cannot cut {name}, of shape {tuple(value.shape)}, into the documents of a packed row"
        )

    return {name: cut(name, value) for name, value in arguments.items()}


def _is_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _join(results: list[tuple[Any, Tensor]], order: Tensor) -> Any:
    """Return the output for the row from those of groups of documents and the validity of their tokens."""
    first = results[0][0]
    if isinstance(first, tuple | list):
        columns = zip(*(output for output, _ in results), strict=True)
        masks = [valid for _, valid in results]
        return type(first)(_join(list(zip(column, masks, strict=True)), order) for column in columns)
    if not isinstance(first, Tensor):
        return first
    # Weights of attention, or a state, belong to no token of the row; a document may have as many as heads.
    if any(output.shape[:2] != valid.shape for output, valid in results):
        return None
    if not first.is_floating_point():  # tokens that sparse attention chooses; repeat some in short documents
        width = torch.arange(max(output.shape[-1] for output, _ in results), device=first.device)
        results = [(output[..., width.clamp(max=output.shape[-1] - 1)], valid) for output, valid in results]
    return torch.cat([output[valid] for output, valid in results])[order][None]
