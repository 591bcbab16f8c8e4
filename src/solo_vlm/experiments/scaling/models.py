"""SOLO models of several sizes, of one architecture and with one tokenizer, from random weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from solo_vlm.models.from_llm import compose
from solo_vlm.models.load import load_config
from solo_vlm.utils.errors import SoloError


def write_sized_model(
    out: Path, llm: str | Path, size: Mapping[str, int], base_width: int, seed: int = 0
) -> None:
    """Write an untrained SOLO model, unless it is there already.

    Args:
        out: its folder.
        llm: folder or hub id of the LLM whose configuration and tokenizer it gets.
        size: what it changes in that configuration.
        base_width: hidden size at which weights have the spread that the configuration says; they go with
            width^-1/2 from there (Yang et al. 2022, "Tensor Programs V", table 3).
        seed: of the weights.

    Raises:
        SoloError: the LLM cannot be read or has no such setting, the sizes do not fit together, or a model of
            another size is there.
    """
    config = _config(llm, size)
    config.initializer_range *= (base_width / config.hidden_size) ** 0.5
    if out.exists():
        return _check_same(out, config, [*size, "initializer_range"])
    set_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(llm)
    except (OSError, ValueError) as error:
        raise SoloError(f"cannot make a model of {llm} with {dict(size)}: {error}") from error
    compose(model.eval(), tokenizer, seed=seed).save(out)


def _check_same(model: Path, config: Any, settings: Sequence[str]) -> None:
    there = load_config(model).text_config
    for name in settings:
        found, wanted = getattr(there, name), getattr(config, name)
        if found != wanted:
            raise SoloError(
                f"{model} has {name} {found}, the sweep {wanted}: remove it and its runs, or choose another "
                "root"
            )


def _config(llm: str | Path, size: Mapping[str, int]) -> Any:
    try:
        config = AutoConfig.from_pretrained(llm)
    except (OSError, ValueError) as error:
        raise SoloError(f"cannot read the configuration of {llm}: {str(error).splitlines()[0]}") from error
    settings = config.to_dict()
    for key in size.keys() - settings.keys():
        near = difflib.get_close_matches(key, settings, n=1)
        raise SoloError(f"{llm} has no setting {key}" + (f"; did you mean {near[0]}?" if near else ""))
    derived = ["layer_types"]
    if settings.get("head_dim") == config.hidden_size // config.num_attention_heads:
        derived.append("head_dim")
    kept = {key: value for key, value in settings.items() if key not in derived}
    return AutoConfig.for_model(**{**kept, **size})
