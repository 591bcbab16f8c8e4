"""Export of a sharded model without gathering it in one process."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from solo_vlm.models.load import save_model
from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.utils.files import new_folder

_FILE_SIZE = 5 * 10**9  # bytes


def can_save_sharded(model: PreTrainedModel) -> bool:
    """Return whether the names and shapes of a model's weights are those of its published files.

    transformers converts the others when it saves them, for example fused experts, which needs whole tensors.
    """
    weights = {name: tensor.to("meta") for name, tensor in _weights(model).items()}
    converted = revert_weight_conversion(model, dict(weights))
    return {name: t.shape for name, t in converted.items()} == {name: t.shape for name, t in weights.items()}


def save_sharded(
    path: Path,
    model: PreTrainedModel,
    processor: Any,
    context: DistributedContext,
    file_size: int = _FILE_SIZE,
) -> None:
    """Save a sharded model as a folder for `from_pretrained`; a collective call.

    Each process writes its shards, and rank 0 joins the files, tensor by tensor. All processes must see the
    folder.
    """
    weights = _weights(model)
    with ExitStack() as stack:

        def prepare() -> Path:
            folder = stack.enter_context(new_folder(path))
            save_model(folder, model, processor, state_dict={})
            for empty in folder.glob("*.safetensors"):
                empty.unlink()
            return folder

        folder = context.broadcast_from_rank0(prepare)
        writer = HuggingFaceStorageWriter(
            str(folder),
            fqn_to_index_mapping=_assign_files(weights, file_size),
            save_distributed=True,
            enable_consolidation=True,
        )
        save(dict(weights), storage_writer=writer)
        if context.is_main_process:
            shutil.rmtree(writer.path)  # the shards


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what `save_pretrained` saves: each tied weight once, and persistent buffers."""
    own = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}


def _assign_files(weights: Mapping[str, Tensor], file_size: int) -> dict[str, int]:
    """Return the number of each weight's file, from 1, in order."""
    files, number, size = {}, 1, 0
    for name, tensor in weights.items():
        length = tensor.numel() * tensor.element_size()
        if size and size + length > file_size:
            number, size = number + 1, 0
        files[name] = number
        size += length
    return files
