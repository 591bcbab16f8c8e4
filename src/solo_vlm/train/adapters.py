"""LoRA, rows of the token embedding and 4-bit weights, all through PEFT and bitsandbytes.

Adapters go into the model's own layers (transformers' `add_adapter`). So sharding, checkpoints, the
attention and the loss see an ordinary model, only with fewer trainable parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from solo_vlm.models.quantization import HEAD, PATCH_EMBEDDING
from solo_vlm.train.recipe import LoraSettings
from solo_vlm.utils.errors import SoloError


def add_adapters(model: PreTrainedModel, lora: LoraSettings | None, new_tokens: bool) -> None:
    """Freeze a model and put adapters into it; the patch embedding, where there is one, is trained whole.

    Args:
        model: a SOLO model or an LLM of transformers. It is changed.
        lora: adapters of the decoder's linear layers (Hu et al. 2021), or None for none.
        new_tokens: train the rows of SOLO's own tokens, in the token embedding and in the head. They are
            parameters of their own that take the place of the frozen rows, so nothing else can move,
            neither by a gradient nor by weight decay.

    Raises:
        SoloError: the decoder has no layer of a name that `lora.targets` gives.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    settings: dict[str, Any] = {"target_modules": DUMMY_TARGET_MODULES}  # PEFT's word for no layer
    if lora:
        settings = {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": _targets(model, lora),
            "exclude_modules": [PATCH_EMBEDDING, HEAD],
        }
    if model.config.model_type == "solo":
        settings["modules_to_save"] = [PATCH_EMBEDDING]
    if new_tokens:
        settings["trainable_token_indices"] = _token_rows(model)
    model.add_adapter(LoraConfig(**settings))


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether `add_adapters` has been here."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The trained parameters by name, gathered from all processes, on the CPU. All processes must call it."""
    return {name: _full(p) for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter as PEFT does, for `PeftModel.from_pretrained`; one process does it.

    Args:
        model: with adapters.
        weights: its `adapter_weights`.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`.
    """
    model.save_pretrained(folder, state_dict=weights)


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a saved adapter merged into its weights: an ordinary one, with no trace of PEFT.

    Args:
        base: the model that training started from, not quantised. It is changed.
        folder: of `save_adapter`.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()


def _targets(model: PreTrainedModel, lora: LoraSettings) -> str | list[str]:
    if isinstance(lora.targets, str):
        return lora.targets
    linear = {name.split(".")[-1] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    names = linear - {PATCH_EMBEDDING, HEAD}
    if unknown := set(lora.targets) - names:
        raise SoloError(
            f"lora.targets: the decoder has no linear layer {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(names))}"
        )
    return list(lora.targets)


def _token_rows(model: PreTrainedModel) -> dict[str, list[int]]:
    """Rows of SOLO's own tokens, by the name of the layer; a tied head follows the embedding."""
    rows = list(model.config.vision_token_ids)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return {name: rows} if model.config.tie_word_embeddings else {name: rows, HEAD: rows}


def _full(parameter: Tensor) -> Tensor:
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().cpu()
