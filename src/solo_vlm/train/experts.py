"""Mixtures of experts in training: auxiliary loss and biases of the routers, and load of the experts."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.utils.errors import SoloError

logger = logging.getLogger(__name__)

Routed = tuple[Tensor, Tensor]
"""Output of a router: logits (tokens, experts), and chosen experts (tokens, top_k), -1 for none."""

_AUX_LOSS = "load_balancing_loss_func"  # in the module of every family that has one
_AUX_LOSS_ARGUMENTS = {"gate_logits", "num_experts", "top_k", "attention_mask"}
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")  # the latter: JetMoe, DBRX
_TOP_K = ("num_experts_per_tok", "moe_top_k")  # the latter: DBRX
_EXPERTS = ("n_routed_experts", "num_experts")  # the latter: Zaya
_BIASES = ("e_score_correction_bias", "expert_bias")  # the latter: AFMoE, LFM2 MoE


class ExpertRouting:
    """Routing of tokens to experts, recorded by hooks while the model computes packed rows.

    The auxiliary loss is the function of the model's family in transformers (Fedus et al. 2021, "Switch
    Transformers", equations 4 to 6), over the tokens of one row without its padding. The loss of a step is
    the mean over its rows, weighted by their tokens, so its strength depends neither on gradient accumulation
    nor on the number of processes.

    Biases of routers affect the choice of experts alone. After a step, they rise for experts with less than
    an equal share of its tokens, and fall for those with more (Wang et al. 2024, "Auxiliary-loss-free load
    balancing strategy for mixture-of-experts", algorithm 1).

    Attributes:
        coefficient: Factor of the auxiliary loss.
        bias_update: Change of a bias per step.
    """

    def __init__(
        self,
        routers: Sequence[tuple[nn.Module, int]],
        top_k: int,
        experts: int | None,
        aux_loss: Callable[..., Tensor] | None,
        coefficient: float,
        slices: DeviceMesh | None,
        biases: Sequence[Tensor | None],
        bias_update: float,
    ) -> None:
        self.coefficient, self.bias_update, self._biases = coefficient, bias_update, biases
        self._top_k, self._aux_loss, self._slices = top_k, aux_loss, slices
        self._routers = [router for router, _ in routers]
        self._experts = experts  # LongCat-Flash and Zaya have more classes, whose tokens skip the experts
        self._is_recording = False
        self.start_step([], 0)
        for router, index in routers:
            router.register_forward_hook(partial(self._record, index))

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        coefficient: float | Literal["auto"] = "auto",
        slices: DeviceMesh | None = None,
        bias_update: float = 0.0,
    ) -> Self | None:
        """Observe the routers of a model; None if it has none.

        Args:
            coefficient: Factor of the auxiliary loss. "auto": the model's own; 0 if its routers are frozen,
                or if transformers has no auxiliary loss for its family.
            slices: Processes that compute a slice of each row, in order. None: this one computes whole rows.
            bias_update: Change of the routers' biases per step; see `prepare_biases`.

        Raises:
            SoloError: The family has no auxiliary loss for the given coefficient, or one of its own kind.
        """
        config = model.config.get_text_config()
        decoder, routers = _find_routers(model)
        aux_loss = _family_function(decoder, _AUX_LOSS) if routers else None
        biases = _find_biases(model)
        if coefficient not in ("auto", 0) and aux_loss is None:
            raise SoloError(
                f"router_aux_loss = {coefficient}: transformers has no auxiliary loss for the routers of "
                f"{config.model_type} models; set it to auto or 0"
            )
        if coefficient == "auto":
            is_trained = any(p.requires_grad for router, _ in routers for p in router.parameters())
            if is_trained and aux_loss is None and not bias_update:
                advice = "; router_bias_update balances them by biases" if biases else ""
                logger.warning(
                    "no auxiliary loss balances the experts: transformers has none for %s%s",
                    *(config.model_type, advice),
                )
            coefficient = _setting(config, _COEFFICIENTS) or 0.0 if aux_loss and is_trained else 0.0
        if aux_loss and inspect.signature(aux_loss).parameters.keys() != _AUX_LOSS_ARGUMENTS:
            if coefficient:
                raise SoloError(
                    f"router_aux_loss: the auxiliary loss of {config.model_type} models is not supported; "
                    "set it to 0"
                )
            aux_loss = None
        if not routers:
            return None
        top_k = _setting(config, _TOP_K) or 1
        tensors = [
            model.get_buffer(biases[router]) if bias_update and router in biases else None
            for router, _ in routers
        ]
        experts = _setting(config, _EXPERTS)
        return cls(routers, top_k, experts, aux_loss, coefficient, slices, tensors, bias_update)

    def start_step(self, tokens: Sequence[int], total: int) -> None:
        """Start an optimizer step.

        Args:
            tokens: Tokens of each of this process's rows, without the padding at its end.
            total: Tokens of the global batch.
        """
        self._tokens, self._total = tokens, total
        self._load: list[Tensor] = []
        self._aux: list[Tensor] = []

    @contextmanager
    def recording(self) -> Iterator[list[Routed]]:
        """Record the routers in the body, a forward pass; recomputation comes later and is not recorded."""
        routed: list[Routed] = []
        self._is_recording = True
        try:
            with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
                yield routed
        finally:
            self._is_recording = False
        routed += [vars(router).pop("routed") for router in self._routers]

    def add_row(self, row: int, routed: Sequence[Routed]) -> Tensor | float:
        """Add a row of the step to its metrics; return the term that it adds to the loss.

        Args:
            row: Index of the row among this process's rows.
            routed: Record of its forward pass.
        """
        tokens, weight = self._tokens[row], 1
        if self._slices is not None:  # the loss of a row is that of the process of its first slice
            routed = _whole_row(routed, self._slices)
            weight = int(self._slices.get_local_rank() == 0)
        is_token = torch.arange(len(routed[0][0]), device=routed[0][0].device) < tokens
        load = [_tokens_per_expert(*router, is_token)[: self._experts] for router in routed]
        self._load = [a + b for a, b in zip(self._load, load, strict=True)] if self._load else load
        if self._aux_loss is None or not tokens:
            return 0.0
        logits = tuple(logits.float() for logits, _ in routed)
        with torch.set_grad_enabled(self.coefficient != 0):
            aux = self._aux_loss(logits, logits[0].shape[-1], self._top_k, is_token[None])
        aux = aux * (weight * tokens / self._total)
        self._aux.append(aux.detach())
        return self.coefficient * aux

    @torch.no_grad()
    def update_biases(self, context: DistributedContext) -> None:
        """Move the biases, if they are to be, by the load of the step over all processes; a collective call.

        The change is centered, as in torchtitan: the same for all experts would change no choice, but add up.
        """
        if not self.bias_update:
            return
        for bias, load in zip(self._biases, self._sum_load(context), strict=True):
            if bias is not None:
                missing = (load.sum() - len(load) * load).sign().to(bias.dtype)  # of integers, so exact
                bias += self.bias_update * (missing - missing.mean()).view_as(bias)

    def metrics(self, context: DistributedContext) -> dict[str, float]:
        """Return the metrics of the step over all processes; a collective call.

        `moe/max_load` is the load of the busiest expert of any layer, relative to an equal share;
        `moe/unused_experts` the number of experts, over all layers, without a token; `moe/aux_loss` the
        auxiliary loss before its coefficient; `moe/bias_range` the largest difference between two biases of a
        layer, if they are updated.
        """
        inner = _innermost(self._routers)
        loads = zip(self._routers, self._sum_load(context), strict=True)
        counts = [load.double().cpu() for router, load in loads if router in inner]
        metrics = {
            "moe/max_load": max(float(load.max() / load.mean().clamp(min=1e-9)) for load in counts),
            "moe/unused_experts": sum(int((load == 0).sum()) for load in counts),
        }
        if self._aux_loss is not None:
            aux = torch.stack(self._aux).sum().item() if self._aux else 0.0
            (metrics["moe/aux_loss"],) = context.sum(aux)
        if self.bias_update:
            ranges = [bias.max() - bias.min() for bias in self._biases if bias is not None]
            metrics["moe/bias_range"] = torch.stack(ranges).max().item()
        return metrics

    def _sum_load(self, context: DistributedContext) -> list[Tensor]:
        """Return the tokens of the step per expert of each layer, the same in every process."""
        sizes = [len(load) for load in self._load]
        return list(context.sum_groups(torch.cat(self._load)).split(sizes))

    def _record(self, index: int, router: nn.Module, arguments: Any, output: Any) -> None:
        if not self._is_recording:
            return
        outputs = output if isinstance(output, tuple) else (output,)
        logits = outputs[index]
        logits = logits.reshape(-1, logits.shape[-1])
        chosen = [
            states.reshape(len(logits), -1)
            for states in outputs
            if isinstance(states, Tensor) and not states.is_floating_point() and states.ndim > 1
        ]
        # Routers that do not return their choice choose by the logits (DBRX, JetMoe, Llama 4).
        choice = chosen[0] if chosen else logits.detach().topk(self._top_k).indices
        for weights in outputs[index + 1 :]:  # Zaya's choice of tokens that skip is expert 0, with weight 0
            if isinstance(weights, Tensor) and weights.is_floating_point() and weights.shape == choice.shape:
                choice = choice.masked_fill(weights.detach() == 0, -1)
        # In the module, because compiled layers would be specialized to the length of a common list.
        router.routed = logits, choice  # type: ignore[assignment]


def router_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that choose experts, with all modules in them."""
    named = {module for module in model.modules() if "Router" in type(module).__name__}
    found = _innermost([router for router, _ in _find_routers(model)[1]])
    return {part for router in named | found for part in router.modules()}


def prepare_biases(model: PreTrainedModel, is_updated: bool) -> None:
    """Make float32 buffers of the routers' biases, in place; training may update them.

    Some families have frozen parameters instead, which FSDP would round to bfloat16.

    Raises:
        SoloError: There are no biases to update.
    """
    biases = _find_biases(model)
    if is_updated and not biases:
        raise SoloError(
            f"router_bias_update: the routers of this {model.config.get_text_config().model_type} model have "
            "no biases that balance experts as in DeepSeek-V3; set it to 0"
        )
    for name in biases.values():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        bias = getattr(module, own).detach().float()
        delattr(module, own)
        module.register_buffer(own, bias)
    model.trained_buffers = [*biases.values()] if is_updated else []  # type: ignore[assignment]


def _find_biases(model: PreTrainedModel) -> dict[nn.Module, str]:
    """Map routers to the names of the biases that balance their experts; some families have it beside.

    Not those of LongCat-Flash and Zaya, which also decide how many tokens skip the experts.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, str] = {}
    if getattr(model.config.get_text_config(), "zero_expert_num", None):  # LongCat-Flash
        return found
    for router, _ in _find_routers(model)[1]:
        block = names[router].rpartition(".")[0]
        for name in model.get_submodule(block).state_dict(prefix=f"{block}."):
            if name.rpartition(".")[2] in _BIASES:
                found[router] = name
    return found


def _find_routers(model: nn.Module) -> tuple[PreTrainedModel | None, list[tuple[nn.Module, int]]]:
    """Return the decoder and its routers, each with the index of the logits in its output.

    transformers declares them in each family, for `output_router_logits`.
    """
    for decoder in model.modules():
        declared = (isinstance(decoder, PreTrainedModel) and decoder._can_record_outputs) or {}
        if "router_logits" not in declared:
            continue
        recorders = declared["router_logits"]
        recorders = recorders if isinstance(recorders, list) else [recorders]
        return decoder, [
            (module, recorder.index)
            for name, module in decoder.named_modules()
            for recorder in recorders
            if isinstance(recorder, OutputRecorder)
            and isinstance(module, recorder.target_class)
            and f".{recorder.layer_name or ''}".rstrip(".") in f".{name}"
        ]
    return None, []


def _innermost(routers: Sequence[nn.Module]) -> set[nn.Module]:
    """Return routers without those with another in them: JetMoe's attention is found besides its router."""
    return {router for router in routers if set(routers).isdisjoint([*router.modules()][1:])}


def _family_function(model: nn.Module | None, name: str) -> Callable[..., Tensor] | None:
    """Return a function of the module that defines a model's class; FSDP derives a class of its own."""
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    return next(chain((vars(module)[name] for module in modules if name in vars(module)), [None]))


def _setting(config: Any, names: Sequence[str]) -> Any:
    """Return the first of a configuration's settings that is there; DBRX has its own section for experts."""
    sections = (config, getattr(config, "ffn_config", None))
    return next((getattr(part, name) for part in sections for name in names if hasattr(part, name)), None)


def _whole_row(routed: Sequence[Routed], slices: DeviceMesh) -> list[Routed]:
    """Return the outputs of routers for all slices of a row, exchanged for all layers at once.

    The choices are waited for first: gloo was seen to corrupt memory with many gathers under way.
    """
    logits, chosen = (torch.cat(outputs, dim=1) for outputs in zip(*routed, strict=True))
    choices = chosen.new_empty(slices.size() * len(chosen), chosen.shape[1])
    dist.all_gather_into_tensor(choices, chosen, group=slices.get_group())
    scores = all_gather_tensor_autograd(logits, 0, slices)
    experts, counts = ([output.shape[1] for output in outputs] for outputs in zip(*routed, strict=True))
    return list(zip(scores.split(experts, dim=1), choices.split(counts, dim=1), strict=True))


def _tokens_per_expert(logits: Tensor, chosen: Tensor, is_token: Tensor) -> Tensor:
    """Return the number of tokens routed to each expert, (experts,) int64."""
    counted = (is_token[:, None] & (chosen >= 0)).flatten().long()
    return counted.new_zeros(logits.shape[-1]).scatter_add_(0, chosen.flatten().clamp(min=0), counted)
