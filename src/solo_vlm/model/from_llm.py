"""An LLM becomes a SOLO model: four new tokens, one linear layer, everything else as it was."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from solo_vlm.errors import SoloError
from solo_vlm.files import new_folder
from solo_vlm.model.chat_template import SOLO_CHAT_TEMPLATE, with_images
from solo_vlm.model.configuration_solo import SoloConfig
from solo_vlm.model.image_processing_solo import SoloImageProcessor
from solo_vlm.model.modeling_solo import SoloForConditionalGeneration
from solo_vlm.model.processing_solo import ChatTemplateError, SoloProcessor

logger = logging.getLogger(__name__)

# <vpatch> comes first: servers take the most frequent id of an image for its placeholder, and the smallest
# id among equals, which matters for an image of one patch.
_VISION_TOKENS = {
    "image_token": "<vpatch>",
    "vision_start_token": "<vision>",
    "vision_row_token": "<vrow_sep>",
    "vision_end_token": "</vision>",
}
_VOCABULARY_MULTIPLE = 64
_LOGITS_TOLERANCE = 1e-5


@dataclass
class SoloModelAndProcessor:
    """What `from_llm` returns: a model and the processor that feeds it."""

    model: SoloForConditionalGeneration
    processor: SoloProcessor

    def save(self, out: Path) -> None:
        """Write one `save_pretrained` folder; it appears under its name only when it is complete."""
        with new_folder(out) as folder:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)


def from_llm(
    llm: str | Path,
    gguf_file: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    image_processor: SoloImageProcessor | None = None,
) -> SoloModelAndProcessor:
    """Turn a causal language model into a SOLO model that has yet to see an image.

    Rows of the new tokens start at the mean of the existing rows, told apart by a trace of noise with
    their covariance, which bounds how far the LLM's predictions can move (Hewitt 2021, "Initializing New
    Word Embeddings for Pretrained Language Models"; transformers' `mean_resizing`). The patch embedding is
    drawn so that a patch of independent, unit-variance pixels has the spread of a token embedding. The
    text-only logits stay the LLM's own; this is checked.

    Args:
        llm: hub id or local folder of a transformers causal language model.
        gguf_file: file inside it, for GGUF weights; they are dequantised.
        dtype: "auto" (as stored; float32 for GGUF), or a torch dtype's name.
        seed: for the new weights.
        image_processor: default: the release's preprocessing.

    Raises:
        SoloError: the folder cannot be read as a language model, or its head cannot be reproduced.
    """
    tokenizer, language_model = _load(llm, gguf_file, dtype)
    return compose(language_model, tokenizer, seed=seed, image_processor=image_processor)


def compose(
    language_model: PreTrainedModel,
    tokenizer: Any,
    seed: int = 0,
    image_processor: SoloImageProcessor | None = None,
) -> SoloModelAndProcessor:
    """As `from_llm`, from a causal language model and its tokenizer in memory; both are changed."""
    probe = _probe_tokens(tokenizer, language_model)
    expected = _text_logits(language_model, probe)
    image_processor = image_processor or SoloImageProcessor()
    spelling = _add_vision_tokens(tokenizer)
    if tokenizer.pad_token is None:  # batches of prompts are padded; attention masks hide what with
        tokenizer.pad_token = tokenizer.eos_token
    processor = SoloProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=_chat_template(tokenizer, spelling["image_token"]),
        **spelling,
    )
    _check_template(processor)

    torch.manual_seed(seed)
    rows = max(len(tokenizer), language_model.get_input_embeddings().num_embeddings)
    language_model.resize_token_embeddings(rows, pad_to_multiple_of=_VOCABULARY_MULTIPLE)
    image_id, start_id, row_id, end_id = tokenizer.convert_tokens_to_ids(list(spelling.values()))
    config = SoloConfig(
        text_config=language_model.config,
        vision_patch_size=image_processor.patch_size,
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
        image_token_id=image_id,
        vision_start_token_id=start_id,
        vision_row_token_id=row_id,
        vision_end_token_id=end_id,
        dtype=language_model.dtype,
    )
    model = _assemble(language_model, config)
    model.generation_config = _generation_config(language_model, tokenizer, config)

    difference = (_text_logits(model, probe)[..., : expected.shape[-1]] - expected).abs().max().item()
    if difference > _LOGITS_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise SoloError(
            f"text logits differ from the LLM's own by {difference:.2g}: its head computes something that "
            f"SOLO does not reproduce ({type(language_model).__name__}); please report this architecture"
        )
    return SoloModelAndProcessor(model, processor)


def _load(llm: str | Path, gguf_file: str | None, dtype: str) -> tuple[Any, PreTrainedModel]:
    source, options = str(llm), {"gguf_file": gguf_file} if gguf_file else {}
    if gguf_file and not (Path(source) / gguf_file).is_file() and Path(source).is_dir():
        raise SoloError(f"{source} has no file {gguf_file}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto" if dtype == "auto" else getattr(torch, dtype), **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SoloError(f"cannot read a language model from {source}: {reason}") from error
    if gguf_file:
        model = _without_quantization(model, llm)
    return tokenizer, model.eval()


def _without_quantization(model: PreTrainedModel, llm: str | Path) -> PreTrainedModel:
    """A model loaded from GGUF refuses to be saved: the same weights in a fresh, ordinary one."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.config.name_or_path = str(llm)
    return plain


def _add_vision_tokens(tokenizer: Any) -> dict[str, str]:
    """Add the four tokens; return their spelling, which differs where the LLM owns such a token."""
    spelling = {}
    for role, token in _VISION_TOKENS.items():
        free = token
        while tokenizer.convert_tokens_to_ids(free) not in (None, tokenizer.unk_token_id):
            free = f"<solo:{free.strip('<>')}>" if free == token else free.replace(">", "_>")
        if free != token:
            logger.warning("the LLM owns a token %s already: images use %s", token, free)
        tokenizer.add_tokens([_special(free)], special_tokens=True)
        spelling[role] = free
    return spelling


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)


def _chat_template(tokenizer: Any, image_token: str) -> str:
    own = tokenizer.chat_template
    return with_images(own if isinstance(own, str) and own else SOLO_CHAT_TEMPLATE, image_token)


def _check_template(processor: SoloProcessor) -> None:
    """Fall back on the paper's template where the LLM's own does not render chats turn by turn."""
    turns = [{"role": role, "content": "Hi."} for role in ("user", "assistant", "user", "assistant")]
    try:
        processor.encode_chat(turns)
    except ChatTemplateError as error:
        logger.warning("the LLM's chat template is replaced by the SOLO paper's: %s", error)
        processor.chat_template = with_images(SOLO_CHAT_TEMPLATE, processor.image_token)
        processor.encode_chat(turns)


@torch.no_grad()
def _assemble(language_model: PreTrainedModel, config: SoloConfig) -> SoloForConditionalGeneration:
    with torch.device("meta"):
        model = SoloForConditionalGeneration(config)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    tokens = language_model.get_input_embeddings().weight
    model.model.embed_vision_patch = nn.Linear(
        config.patch_dim, config.text_config.hidden_size, bias=False, dtype=tokens.dtype
    )
    spread = tokens.float().std().item() / config.patch_dim**0.5
    model.model.embed_vision_patch.weight.normal_(std=spread)
    model.tie_weights()
    return model.eval()


def _generation_config(
    language_model: PreTrainedModel, tokenizer: Any, config: SoloConfig
) -> GenerationConfig:
    """The LLM's own, greedy, which never speaks in vision tokens or in rows that pad the vocabulary."""
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=language_model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    padding = range(len(tokenizer), config.text_config.vocab_size)
    generation.suppress_tokens = [*config.vision_token_ids, *padding]
    return generation


def _probe_tokens(tokenizer: Any, language_model: PreTrainedModel) -> Tensor:
    vocabulary = min(len(tokenizer), language_model.get_input_embeddings().num_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, 16), generator=generator)


@torch.no_grad()
def _text_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits.float()
