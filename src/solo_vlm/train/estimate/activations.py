"""Memory that a decoder's layers keep for the backward pass, measured without running them.

transformers' own code runs forward on the meta device, where tensors have sizes but no values, and autograd
says which of them it saves. So every family is measured by the code that trains it: norms in float32, gates,
experts, per-layer inputs, scans. It runs on a few short sequences, because the bytes are a polynomial of the
length: linear, but for what has a value for each pair of tokens.

Attention is what `packed_attention` does on CUDA with flash attention. State-space and linear-attention
layers run in the PyTorch code of transformers; kernels of other packages may save less.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from solo_vlm.models.flops import build_without_weights
from solo_vlm.models.load import decoder_layers, model_without_weights
from solo_vlm.models.packed.attention import packed_attention
from solo_vlm.models.packed.isolation import Isolation, isolate_documents
from solo_vlm.train.activation_checkpointing import MODES, SAVED_OPERATORS, Mode
from solo_vlm.train.parallel.tensor_parallel import keep_share
from solo_vlm.utils.errors import SoloError, first_line

_MEASURED = "solo_measured"  # attention of the measured models
_LENGTH = 64  # tokens: a multiple of the chunks of linear attention; settings of Mamba 2 name theirs
_MULTIPLES = (2, 3, 4)  # of that length: a single chunk is computed in another way
_NEGLIGIBLE = 0.02  # share of what is kept

# While tracing, which takes longer, transformers does not look at values. Some families do not use its
# attention interface, or need its masks.
_tracing = partial(FakeTensorMode, allow_non_fake_inputs=True)
_Attempt = tuple[str, Callable[[], AbstractContextManager[Any]]]
_PACKED: tuple[_Attempt, ...] = ((_MEASURED, nullcontext), (_MEASURED, _tracing))
_DENSE: tuple[_Attempt, ...] = (("sdpa", _tracing), ("eager", _tracing), ("eager", nullcontext))

_WITH_MASKS: set[Isolation] = {"mask", "masks by document"}

_Storages = dict[int, torch.UntypedStorage]  # by identity, which is not reused while they are held


@dataclass(frozen=True, eq=False)
class Activations:
    """Bytes that a packed sequence leaves for the backward pass in one process.

    They are measured when they are first asked for, which takes about a second.

    Attributes:
        config: Configuration of a SOLO model or a plain LLM.
        dtype: Compute precision.
        tp: Processes that split layers.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    tp: int

    def outside(self, tokens: int) -> float:
        """Return the bytes that the decoder saves outside layers.

        Args:
            tokens: Tokens that the process computes, of one document.
        """
        return float(self._bytes(tokens)[0])

    def layers(self, tokens: int) -> list[dict[Mode, float]]:
        """Return the bytes of each layer, in order, by its activation checkpointing; see `outside`."""
        rows = self._bytes(tokens)[1:].reshape(-1, len(MODES)).tolist()
        return [dict(zip(MODES, row, strict=True)) for row in rows]

    def require_linear(self, tokens: int) -> None:
        """Raise SoloError if layers keep something for each pair of tokens; see `outside`.

        How much that is depends on the lengths of documents, so `layers` is only an upper bound.
        """
        for name, treatment in self._treatments.items():
            if treatment in _WITH_MASKS:
                raise SoloError(f"what {name} keeps grows with the square of a document's length")
        of_pairs = self._coefficients[0] * tokens**2
        if (abs(of_pairs) > _NEGLIGIBLE * self._bytes(tokens)).any():
            family = self._text.model_type
            raise SoloError(f"what layers of {family} keep grows with the square of a document's length")

    @property
    def _text(self) -> PreTrainedConfig:
        return self.config.get_text_config(decoder=True)

    @cached_property
    def _treatments(self) -> dict[str, Isolation]:
        return isolate_documents(model_without_weights(self.config))

    def _bytes(self, tokens: int) -> NDArray[np.float64]:
        square, linear, constant = self._coefficients
        return square * tokens**2 + linear * tokens + constant  # (1 + 3 * layers,)

    @cached_property
    def _coefficients(self) -> NDArray[np.float64]:
        """(3, 1 + 3 * layers): factors of the length's square, of the length, and of 1, see `_run`."""
        text, failure = self._text, ""
        chunk = getattr(text, "mamba_chunk_size", None) or getattr(text, "chunk_size", None) or _LENGTH
        lengths = [multiple * max(chunk, _LENGTH) for multiple in _MULTIPLES]
        for attention, mode in _DENSE if _WITH_MASKS & set(self._treatments.values()) else _PACKED:
            try:
                with mode():
                    model = self._build(attention)
                    sizes = [_run(model, length) for length in lengths]
            except Exception as error:  # code of any family
                failure = first_line(error)
                continue
            return np.linalg.solve(np.vander(lengths, 3), np.array(sizes, float))
        raise SoloError(f"cannot measure what layers of {text.model_type} keep: {failure}")

    def _build(self, attention: str) -> PreTrainedModel:
        model = build_without_weights(self._text, attention).train()
        if self.tp > 1:
            keep_share(model, self.tp)
        for parameter in model.parameters():  # not buffers, as FSDP does
            parameter.data = parameter.data.to(self.dtype)
        return model


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Attend within a row of one document, whose bounds have values (transformers' attention interface)."""
    bounds = torch.tensor([0, query.shape[2]], dtype=torch.int32, device="cpu")
    row = {"cu_seq_lens_q": bounds, "max_length_q": query.shape[2]}
    return packed_attention(None, query, key, value, attention_mask, **options | row)


AttentionInterface.register(_MEASURED, _attend)


def _run(model: PreTrainedModel, length: int) -> list[int]:
    """Run a decoder forward; return the bytes saved outside layers, and those of each layer by mode."""
    recorder = _Recorder(model)
    handles = [
        handle
        for layer in recorder.layers
        for handle in (
            layer.register_forward_pre_hook(recorder.enter, with_kwargs=True),
            layer.register_forward_hook(recorder.leave),
        )
    ]
    try:
        with recorder, saved_tensors_hooks(recorder.save, lambda tensor: tensor):
            model.base_model(torch.zeros(1, length, dtype=torch.long, device="meta"), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.sizes


class _Recorder(TorchDispatchMode):
    """Storages that a forward pass keeps, each where it is kept first.

    Attributes:
        outside: Those outside layers.
        layers: Those of each layer, by mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.outside: _Storages = {}
        self.layers: dict[nn.Module, dict[Mode, _Storages]] = {
            layer: {mode: {} for mode in MODES} for layer in decoder_layers(model)
        }
        weights = _storages([*model.parameters(), *model.buffers()])
        self._known: dict[Mode, _Storages] = {mode: dict(weights) for mode in MODES}
        self._layer: nn.Module | None = None

    @property
    def sizes(self) -> list[int]:
        """Bytes outside layers, and those of each layer by mode."""
        parts = [self.outside, *(kept for modes in self.layers.values() for kept in modes.values())]
        return [sum(storage.nbytes() for storage in part.values()) for part in parts]

    def enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a layer, which keeps its arguments if it is recomputed."""
        self._layer = layer
        self._keep("full", (args, kwargs))
        self._keep("selective", (args, kwargs))

    def leave(self, *_: Any) -> None:
        """End a layer."""
        self._layer = None

    def save(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves."""
        if self._layer is not None:
            self._keep("none", tensor)
        else:
            new = {key: s for key, s in _storages(tensor).items() if key not in self._known["none"]}
            self.outside.update(new)
            for known in self._known.values():
                known.update(new)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            left, right, *others = args  # on the meta device, it only takes bfloat16
            output = func(left.bfloat16(), right.bfloat16(), *others, **kwargs or {}).float()
        else:
            output = func(*args, **kwargs or {})
        if self._layer is not None and func._schema.name in SAVED_OPERATORS:
            self._keep("selective", output)
        return output

    def _keep(self, mode: Mode, values: Any) -> None:
        assert self._layer is not None
        new = {key: s for key, s in _storages(values).items() if key not in self._known[mode]}
        self.layers[self._layer][mode].update(new)
        self._known[mode].update(new)


def _storages(values: Any) -> _Storages:
    """Return the storages of the tensors in nested values."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in storages}
