"""The head of a SOLO model and its loss, split over the vocabulary: no process ever holds all logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Shard

from solo_vlm.train.parallel.tensor_parallel import reduce_parts, split_outputs, sum_input_gradients


def can_split_head(vocabulary: int, is_tied: bool, size: int) -> bool:
    """Return whether processes can split a head: a tied one is the embedding, which they all look up."""
    return not is_tied and vocabulary % size == 0


def split_head(model: Any, mesh: DeviceMesh) -> None:
    """Split the head of a SOLO model over its vocabulary, in place, if that is possible.

    The head then returns this process's part of the logits, which scaling and capping leave as they are; the
    model gathers the logits that it returns.
    """
    head = getattr(model, "lm_head", None)
    if model.config.model_type != "solo" or type(head) is not nn.Linear:
        return
    if can_split_head(head.out_features, model.config.tie_word_embeddings, mesh.size()):
        split_outputs(head, mesh)
        sum_input_gradients(head, mesh)
        model.cross_entropy = partial(split_cross_entropy, mesh)
        model.whole_logits = lambda logits: reduce_parts(logits, mesh, Shard(-1))


def split_cross_entropy(mesh: DeviceMesh, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross entropy of logits that are split over the vocabulary, in every process.

    Args:
        logits: (n, vocabulary / processes), this process's part.
        targets: (n,) int64, over the whole vocabulary.
    """
    logits = logits.float()
    size = logits.shape[-1]
    peak = all_reduce(logits.detach().amax(-1), "max", mesh)
    logits = logits - peak[:, None]
    own = targets - mesh.get_local_rank() * size
    is_own = (own >= 0) & (own < size)
    target = logits.gather(-1, own.clamp(0, size - 1)[:, None])[:, 0] * is_own
    total, target = reduce_parts(torch.stack([logits.exp().sum(-1), target]), mesh, Partial())
    return (total.log() - target).sum()
