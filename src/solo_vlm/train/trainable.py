"""Which parameters a run trains: all of them, a few, or adapters in the decoder's place."""

from __future__ import annotations

from transformers import PreTrainedModel

from solo_vlm.train.adapters import add_adapters
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError


def choose_trainable(model: PreTrainedModel, recipe: Recipe, processes: int = 1) -> None:
    """Freeze what the recipe does not train, and put its adapters into the model.

    The model stays the transformers model that it was, and its outputs stay the same. To be called before
    it is sharded, and before an optimizer is made of the parameters that still require a gradient.

    Args:
        model: a SOLO model or an LLM of transformers; on the meta device, too. It is changed.
        recipe: for `trainable`, `lora` and `quantize`.
        processes: of the run.

    Raises:
        SoloError: the recipe's settings contradict each other or do not fit the model.
    """
    _check(model, recipe, processes)
    new_tokens = recipe.trainable == "new_tokens"
    if recipe.lora or new_tokens:
        add_adapters(model, recipe.lora, new_tokens)
    elif recipe.trainable == "patch_embedding":
        model.requires_grad_(False)
        model.get_submodule("model.embed_vision_patch").requires_grad_(True)


def _check(model: PreTrainedModel, recipe: Recipe, processes: int) -> None:
    if recipe.trainable != "all" and model.config.model_type != "solo":
        raise SoloError(
            f"trainable = {recipe.trainable}: a plain LLM has no patch embedding and no tokens of SOLO; "
            "make a SOLO model of it first (solo init), or set trainable to all"
        )
    if recipe.quantize and not recipe.lora:
        raise SoloError("quantize: weights in 4 bits cannot be trained themselves; set lora, too (QLoRA)")
    if recipe.quantize and processes > 1:
        raise SoloError("quantize: weights in 4 bits cannot be sharded; start one process, or train without")
    if recipe.lora and recipe.parallel.tensor > 1:
        raise SoloError("lora: layers with adapters cannot be split; set parallel.tensor to 1")
