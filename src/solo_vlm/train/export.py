"""A trained model as one folder of transformers, from shards, adapters or a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from solo_vlm.models.saving import save_model
from solo_vlm.train.adapters import adapter_weights, has_adapters, merge_adapter, save_adapter
from solo_vlm.train.checkpoint import latest_checkpoint, load_checkpoint
from solo_vlm.train.parallel.processes import Processes
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.start import load_start
from solo_vlm.train.trainable import choose_trainable
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_folder


def export(out: Path, model: PreTrainedModel, processor: Any, recipe: Recipe, processes: Processes) -> Path:
    """Write `out/model`, which `from_pretrained` reads; adapters also by themselves, as `out/adapter`.

    All processes must call it; the first one writes.
    """
    if has_adapters(model):
        weights = adapter_weights(model)
        if processes.is_first:
            # Of an export that was killed before it came to the model: the run was not finished.
            shutil.rmtree(out / "adapter", ignore_errors=True)
            with new_folder(out / "adapter") as folder:
                save_adapter(model, weights, folder)
            merged = merge_adapter(load_start(recipe.model_source())[0], out / "adapter")
            _write(out / "model", merged, processor)
    elif processes.mesh is None:
        _write(out / "model", model, processor)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if processes.is_first:
            _write(out / "model", model, processor, state_dict=state)
    processes.wait()
    return out / "model"


def export_checkpoint(run: Path, out: Path, step: int | None = None) -> int:
    """Write a checkpoint of a run, finished or not, as a folder that `from_pretrained` reads.

    Args:
        run: folder of the run; `recipe.yaml` in it says what the run started from.
        out: to write.
        step: of the checkpoint; default: the newest.

    Returns:
        The checkpoint's step.

    Raises:
        SoloError: no such checkpoint, or what the run started from is gone.
    """
    recipe = Recipe.load(run / "recipe.yaml")
    folder = run / "checkpoints"
    path = latest_checkpoint(folder) if step is None else folder / f"step-{step:08d}"
    if path is None or not path.is_dir():
        there = ", ".join(str(int(found.name[5:])) for found in sorted(folder.glob("step-*")))
        raise SoloError(f"{run} has no such checkpoint" + (f"; there are steps {there}" if there else ""))
    model, processor = load_start(recipe.model_source())
    choose_trainable(model, recipe.model_copy(update={"quantize": None}))
    load_checkpoint(path, model)
    if has_adapters(model):
        with TemporaryDirectory() as adapter:
            save_adapter(model, adapter_weights(model), Path(adapter))
            model = merge_adapter(load_start(recipe.model_source())[0], Path(adapter))
    _write(out, model, processor)
    return int(path.name.removeprefix("step-"))


def _write(path: Path, model: PreTrainedModel, processor: Any, **options: Any) -> None:
    with new_folder(path) as folder:
        save_model(folder, model, processor, **options)
