"""Loss on held-out data, at intervals: the same packed sequences each time."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from solo_vlm.train.agreement import check_same_data
from solo_vlm.train.parallel.processes import Processes
from solo_vlm.train.parallel.shard import reshard
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.start import make_loader
from solo_vlm.train.step import model_inputs, precision, supervised_tokens


class Validation:
    """Measures the mean loss over the supervised tokens of held-out sequences.

    They are packed as one stream, so that they are the same for any number of processes; each process reads
    all and measures its share.

    Args:
        recipe: with `validation`; its other settings of the data hold here, too.
        processor: of the model.
        processes: of the run.

    Raises:
        SoloError: a source is missing or empty.
    """

    def __init__(self, recipe: Recipe, processor: Any, processes: Processes) -> None:
        assert recipe.validation is not None
        data = {"sources": recipe.validation.sources, "epochs": 1, "streams": 1, "workers": 0}
        self._recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
        self._sequences = recipe.validation.sequences
        self._processor = processor
        self._processes = processes
        self._sources = self._recipe.open_sources()
        check_same_data(self._sources, processes)

    @torch.no_grad()
    def loss(self, model: PreTrainedModel) -> float:
        """Mean over the supervised tokens of all; the model is left in training mode."""
        loader = make_loader(self._recipe, self._processor, self._sources)
        sequences = islice(loader, self._sequences)
        model.eval()
        total = supervised = 0.0
        # Every process takes each turn: a sharded model gathers its weights in it.
        while self._processes.max(len(together := list(islice(sequences, self._processes.layout.data)))):
            mine = self._processes.data_rank
            batch = together[mine] if mine < len(together) else loader.empty_batch()
            with precision(self._recipe, self._processes):
                inputs = model_inputs(model, batch)
                total += model(**inputs, use_cache=False, num_items_in_batch=1, logits_to_keep=1).loss.item()
            supervised += supervised_tokens([batch])
        model.train()
        reshard(model)
        total, supervised = self._processes.sum(total, supervised)
        return total / max(supervised, 1)
