"""Memory of the loss alone, from hidden states to their gradient and that of the head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from training.machine import in_fresh_process, peak_growth, this_device
from training.variants import SHAPE
from training.workload import Workload, supervised_share
from transformers.loss.loss_utils import ForCausalLMLoss

from solo_vlm.data.encode import IGNORE_INDEX
from solo_vlm.models.solo.modeling_solo import supervised_cross_entropy


def measure(workload: Workload, full_tokens: int, precision: str) -> dict[str, Any]:
    """Return peak gigabytes of the loss over a packed sequence, each measured in a new process.

    Args:
        workload: Sizes, and the share of supervised tokens.
        full_tokens: Tokens over which all logits are held; their memory is scaled to the whole sequence.
        precision: Precision, as in recipes.
    """
    tokens, share = workload.length, supervised_share(workload.sequence())

    def peak(chunked: bool, length: int, labeled: float) -> float:
        return in_fresh_process(_peak, workload, precision, chunked, length, labeled)

    chunked, every = peak(True, tokens, share), peak(True, tokens, 1.0)
    full = peak(False, full_tokens, share) * tokens / full_tokens
    return {
        "loss_memory_ratio": chunked / full,
        "loss_memory_ratio_all_supervised": every / full,
        "loss_memory": {
            "tokens": tokens,
            "supervised_share": share,
            "full_logits_measured_tokens": full_tokens,
            "chunked_gb": chunked,
            "chunked_all_supervised_gb": every,
            "full_logits_gb": full,
        },
    }


def _peak(workload: Workload, precision: str, chunked: bool, tokens: int, share: float) -> float:
    config = workload.config(SHAPE).text_config
    device = this_device()
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device)
    generator = torch.Generator().manual_seed(0)

    def inputs(length: int) -> tuple[Tensor, Tensor]:
        states = torch.randn(1, length, config.hidden_size, generator=generator)
        labels = torch.randint(config.vocab_size, (1, length), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) >= share] = IGNORE_INDEX
        return states.to(device).requires_grad_(), labels.to(device)

    def forward_and_backward(states: Tensor, labels: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            if chunked:
                loss = supervised_cross_entropy(states, labels, head)
            else:
                loss = ForCausalLMLoss(head(states), labels, config.vocab_size)
        loss.backward()
        head.zero_grad()

    forward_and_backward(*inputs(16))  # initializes libraries
    return peak_growth(partial(forward_and_backward, *inputs(tokens)), device)
