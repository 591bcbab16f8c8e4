"""Checkpoints: a folder each, complete or not there at all, safetensors and JSON only."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from solo_vlm.errors import SoloError
from solo_vlm.files import new_folder
from solo_vlm.train.optimizer import named_trainable

_STATE = "training_state.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass
class Progress:
    """Where a run stands: optimizer steps done, tokens seen, and the state of the data."""

    step: int = 0
    tokens: int = 0
    data: dict[str, Any] | None = None


def save_checkpoint(
    folder: Path, model: PreTrainedModel, processor: Any, optimizer: torch.optim.Optimizer, progress: Progress
) -> Path:
    """Write `folder/step-NNNNNNNN`, which `from_pretrained` reads as well; return its path."""
    path = folder / f"step-{progress.step:08d}"
    with new_folder(path) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        save_file(_optimizer_tensors(model, optimizer), partial / _OPTIMIZER)
        (partial / _STATE).write_text(json.dumps(vars(progress)))
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    return max((path for path in folder.glob("step-*") if (path / _STATE).is_file()), default=None)


def load_training_state(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore the optimizer's moments; return where the run stood. The model is loaded by its own means.

    Raises:
        SoloError: the checkpoint does not belong to this model.
    """
    tensors = load_file(path / _OPTIMIZER)
    for name, parameter in named_trainable(model):
        try:
            optimizer.state[parameter] = {
                "step": tensors[f"{name}/step"],
                "exp_avg": tensors[f"{name}/exp_avg"].to(parameter.device),
                "exp_avg_sq": tensors[f"{name}/exp_avg_sq"].to(parameter.device),
            }
        except KeyError as error:
            raise SoloError(f"{path} does not belong to this model: it lacks {error}") from error
    return Progress(**json.loads((path / _STATE).read_text()))


def keep_newest(folder: Path, count: int) -> None:
    """Remove all checkpoints but the newest."""
    for path in sorted(folder.glob("step-*"))[:-count]:
        shutil.rmtree(path)


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{moment}": tensor.detach().contiguous()
        for name, parameter in named_trainable(model)
        for moment, tensor in optimizer.state[parameter].items()
    }
