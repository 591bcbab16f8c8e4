"""Dealing the packed sequences of a step to data-parallel ranks, so that they wait little for each other.

Ranks that share a copy of the parameters run in lock step: each gathers the weights of every layer together
with the others, so each of the step's microbatches takes as long as its heaviest sequence. Copies meet at the
end of the step. Sequences of equal length differ in FLOPs: attention costs the sum of the squared lengths of
their documents, the head their supervised tokens. In the order of FLOPs, neighbors make a microbatch.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from solo_vlm.data.loader import LoadedSequence
from solo_vlm.models.flops import ModelShape, forward_flops
from solo_vlm.train.parallel.context import DistributedContext

Place = tuple[int, int]
"""Rank that has read a sequence, and the sequence's index there."""


class Balancer:
    """Exchange of a step's sequences between the data-parallel ranks; a collective object.

    Args:
        recomputed: Share of the layers that are computed again, which takes time as other FLOPs do.
    """

    def __init__(self, shape: ModelShape, recomputed: float, context: DistributedContext) -> None:
        assert context.mesh is not None
        self._shape, self._recomputed, self._context = shape, recomputed, context
        ranks = context.mesh.mesh.flatten(1).T.tolist()
        # Sequences are in main memory, so they travel by gloo next to an accelerator, too.
        timeout = timedelta(seconds=context.timeouts.start)
        self._group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout, backend="gloo")

    def __call__(self, sequences: Sequence[LoadedSequence | None]) -> list[LoadedSequence | None]:
        """Return the sequences that this rank computes, given those that it has read."""
        ranks, own, count = self._context.dims.dp, self._context.dp_rank, len(sequences)
        costs = [0.0] * (ranks * count)
        costs[own * count : (own + 1) * count] = map(self._cost, sequences)
        costs = self._context.sum(*costs)
        by_rank = [costs[start : start + count] for start in range(0, len(costs), count)]
        dealt = deal(by_rank, self._context.dims.replicate)
        leaving = [
            {index: sequences[index] for source, index in dealt[rank] if source == own and rank != own}
            for rank in range(ranks)
        ]
        arrived = self._exchange([pickle.dumps(part) if part else b"" for part in leaving])
        found = [pickle.loads(part) if part else {} for part in arrived]
        found[own] = dict(enumerate(sequences))
        return [found[source][index] for source, index in dealt[own]]

    def _cost(self, sequence: LoadedSequence | None) -> float:
        if sequence is None:
            return 0.0
        patches = len(sequence.batch["pixel_values"])
        flops = forward_flops(self._shape, sequence.document_lengths, patches, sequence.supervised_tokens)
        return flops.hardware(self._recomputed)

    def _exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        """Send the i-th part to rank i; return what each has sent to this one."""
        sizes = torch.tensor([len(part) for part in parts])
        incoming = torch.empty_like(sizes)
        dist.all_to_all_single(incoming, sizes, group=self._group)
        received = torch.empty(int(incoming.sum()), dtype=torch.uint8)
        sent = torch.frombuffer(bytearray(b"".join(parts)) or bytearray(1), dtype=torch.uint8)
        sent = sent[: int(sizes.sum())]
        dist.all_to_all_single(received, sent, incoming.tolist(), sizes.tolist(), group=self._group)
        pieces: Sequence[Tensor] = received.split(incoming.tolist())
        return [piece.numpy().tobytes() for piece in pieces]


def deal(costs: Sequence[Sequence[float]], copies: int = 1) -> list[list[Place]]:
    """Return the sequence that each rank computes in each microbatch, heaviest first.

    Neighbors in the order of costs make a microbatch; the copy with the least to do takes the next one. A
    rank keeps a sequence that it has read, if there is any.

    Args:
        costs: Costs of the sequences that each rank has read, equally many.
        copies: Copies of the parameters; neighboring ranks share one.
    """
    ranks = len(costs) // copies
    places = [(rank, index) for rank, own in enumerate(costs) for index in range(len(own))]
    places.sort(key=lambda place: (-costs[place[0]][place[1]], place))
    dealt: list[list[Place]] = [[] for _ in costs]
    loads = [0.0] * copies
    for start in range(0, len(places), ranks):
        microbatch = places[start : start + ranks]
        open_copies = [copy for copy in range(copies) if len(dealt[copy * ranks]) < len(costs[0])]
        copy = min(open_copies, key=loads.__getitem__)
        loads[copy] += costs[microbatch[0][0]][microbatch[0][1]]
        kept = {place[0]: place for place in reversed(microbatch)}
        moved = iter([place for place in microbatch if kept[place[0]] != place or place[0] // ranks != copy])
        for rank in range(copy * ranks, (copy + 1) * ranks):
            dealt[rank].append(kept[rank] if rank in kept else next(moved))
    return dealt


def waiting(costs: Sequence[Sequence[float]], copies: int = 1) -> float:
    """Return the share of time in which ranks wait: for the heaviest of a microbatch, and for other copies.

    Args:
        costs: Costs of the sequences of each rank, by microbatch.
        copies: Copies of the parameters; neighboring ranks share one.
    """
    ranks = len(costs) // copies
    rows = [costs[start : start + ranks] for start in range(0, len(costs), ranks)]
    longest = max(sum(map(max, zip(*row, strict=True))) for row in rows)
    return 1 - sum(map(sum, costs)) / (len(costs) * longest)
