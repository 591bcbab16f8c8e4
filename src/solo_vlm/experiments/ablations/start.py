"""Models that no stage of training makes: the quickstart's untrained LLM, and SOLO models of LLMs."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from solo_vlm.experiments.ablations.chain import Link
from solo_vlm.experiments.ablations.settings import InitSettings
from solo_vlm.models.from_llm import SoloModelAndProcessor, compose, from_llm
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.quickstart.llm import training_texts, write_untrained_llm
from solo_vlm.utils.errors import SoloError


def write_start(link: Link) -> None:
    """Write the model of a link that is not trained.

    Raises:
        SoloError: the LLM cannot be read, or the settings of `init` do not fit together.
    """
    model = link.folder / "model"
    if isinstance(link.by, InitSettings):
        below = link.root / link.source
        _compose(below if below.exists() else link.source, link.by, link.seed).save(model)
    else:
        write_untrained_llm(model, training_texts(link.root / "data"), link.seed)


def _compose(llm: str | Path, settings: InitSettings, seed: int) -> SoloModelAndProcessor:
    try:
        size = {"size": settings.image_size} if settings.image_size else {}
        image_processor = SoloImageProcessor(**size)
    except ValueError as error:
        raise SoloError(f"init.image_size: {error}") from error
    make = _from_random if settings.from_scratch else from_llm
    solo = make(llm, seed=seed, image_processor=image_processor)
    solo.model.config.bidirectional_images = settings.bidirectional_images
    return solo


def _from_random(llm: str | Path, seed: int, image_processor: SoloImageProcessor) -> SoloModelAndProcessor:
    """As `from_llm`, with random weights."""
    try:
        config, tokenizer = AutoConfig.from_pretrained(llm), AutoTokenizer.from_pretrained(llm)
    except (OSError, ValueError) as error:
        raise SoloError(f"cannot read a language model from {llm}: {str(error).splitlines()[0]}") from error
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    return compose(model, tokenizer, seed=seed, image_processor=image_processor)
