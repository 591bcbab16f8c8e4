"""Creation of a SOLO model from an LLM, by adding four tokens and one linear layer."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from solo_vlm.models.checks import check_image_attention
from solo_vlm.models.load import load_config, load_llm, load_tokenizer, pad_left, save_model
from solo_vlm.models.solo.bounded_template import render
from solo_vlm.models.solo.chat_template import (
    CHATML_TEMPLATE,
    CHATML_TOKENS,
    SOLO_CHAT_TEMPLATE,
    has_date,
    with_fixed_date,
    with_images,
    without_system,
)
from solo_vlm.models.solo.configuration_solo import SoloConfig, check_rope_base_2d
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration, make_patch_embedding
from solo_vlm.models.solo.processing_solo import ChatTemplateError, SoloProcessor
from solo_vlm.models.stops import complete_generation, named, stop_fault, stop_ids, stray_stops
from solo_vlm.utils.errors import SoloError, first_line
from solo_vlm.utils.files import new_folder

logger = logging.getLogger(__name__)

# <vpatch> comes first: servers take the most frequent ID of an image as its placeholder, and among equals the
# smallest, which matters for an image of one patch.
_VISION_TOKENS = {
    "image_token": "<vpatch>",
    "vision_start_token": "<vision>",
    "vision_row_token": "<vrow_sep>",
    "vision_end_token": "</vision>",
}
_VOCABULARY_MULTIPLE = 64
_LOGITS_TOLERANCE = 1e-5
_CAUSALITY_TOLERANCE = 1e-2  # rounding of bfloat16 may differ between rows

TemplateSource = Literal["llm", "chatml", "solo"]
_TEMPLATE_NAMES = {"llm": "the LLM's own", "chatml": "ChatML", "solo": "the SOLO paper's"}
_USER, _ASSISTANT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
_USER_WITH_IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi."}]}
_SYSTEM = {"role": "system", "content": "Be brief."}

_FORBID = ("suppress_tokens", "begin_suppress_tokens")
_UNSUPPORTED = ("bad_words_ids", "forced_bos_token_id", "sequence_bias", "force_words_ids")


@dataclass(frozen=True)
class ImageDesign:
    """Settings of `SoloConfig` for reading images; the defaults are the paper's."""

    image_attention: Literal["causal", "bidirectional"] = "causal"
    image_positions: Literal["1d", "2d"] = "1d"
    rope_base_2d: float | None = None
    patch_embedding: Literal["linear", "conv"] = "linear"

    def __post_init__(self) -> None:
        try:
            check_rope_base_2d(self.rope_base_2d, self.image_positions)
        except ValueError as error:
            raise SoloError(str(error)) from error


PAPER_DESIGN = ImageDesign()


@dataclass
class SoloModelAndProcessor:
    """A model and its processor.

    Attributes:
        model: Model in evaluation mode.
        chat_template: Source of the chat template: the LLM, ChatML, or the SOLO paper.
    """

    model: SoloForConditionalGeneration
    processor: SoloProcessor
    chat_template: TemplateSource = "solo"

    @property
    def chat_template_name(self) -> str:
        """Description of the chat template's source."""
        return _TEMPLATE_NAMES[self.chat_template]

    def save(self, out: Path) -> None:
        """Write a `save_pretrained` folder atomically."""
        with new_folder(out) as folder:
            save_model(folder, self.model, self.processor)


def from_llm(
    llm: str | Path,
    gguf_file: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    image_processor: SoloImageProcessor | None = None,
    design: ImageDesign = PAPER_DESIGN,
) -> SoloModelAndProcessor:
    """Make an untrained SOLO model from a causal language model.

    Embeddings of new tokens start at the mean of the existing ones plus small noise with their covariance,
    which bounds the change of the LLM's predictions (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models"; `mean_resizing` in transformers). The patch embedding is initialized so that
    a patch of independent, unit-variance pixels has the standard deviation of a token embedding. Text-only
    logits equal the LLM's, which is checked.

    The LLM's chat template is checked too. If answers cannot be separated from prompts, or training would see
    other prompts than inference, it is replaced by ChatML if the LLM has its tokens, otherwise by the SOLO
    paper's template.

    Args:
        llm: Hub ID or local folder of a causal language model.
        gguf_file: GGUF file in that folder; its weights are dequantized.
        dtype: "auto" (as stored; float32 for GGUF), or the name of a torch dtype.
        seed: Seed for the new weights.
        image_processor: Image processor of the model. Default: the original preprocessing.
        design: Settings for reading images.

    Raises:
        SoloError: The folder is not readable as a language model, its tokenizer has no EOS token, or its
            architecture cannot be reproduced.
    """
    tokenizer, language_model = _load(llm, gguf_file, dtype)
    return compose(language_model, tokenizer, seed, image_processor, design)


def compose(
    language_model: PreTrainedModel,
    tokenizer: Any,
    seed: int = 0,
    image_processor: SoloImageProcessor | None = None,
    design: ImageDesign = PAPER_DESIGN,
) -> SoloModelAndProcessor:
    """Make a SOLO model from a causal language model and its tokenizer in memory; both are modified."""
    _set_eos(tokenizer, language_model)
    vocabulary = min(len(tokenizer), language_model.get_input_embeddings().num_embeddings)
    probe = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    probe[1, -1] = (probe[1, -1] + 1) % vocabulary
    try:
        expected = _text_logits(language_model, probe)
    except Exception as error:  # of any type, from the code of any family
        raise SoloError(
            f"{type(language_model).__name__} cannot compute with the settings of its config.json: "
            f"{first_line(error)}"
        ) from error
    _check_causality(language_model, expected)
    image_processor = image_processor or SoloImageProcessor()
    spelling = _add_vision_tokens(tokenizer)
    if tokenizer.pad_token is None:  # any token does: the attention mask hides padding
        tokenizer.pad_token = tokenizer.eos_token
    pad_left(tokenizer)
    own = _own_template(tokenizer)
    _make_control_tokens_special(tokenizer, own)
    processor = SoloProcessor(image_processor=image_processor, tokenizer=tokenizer, **spelling)
    chat_template = _set_template(processor, own)
    tokenizer.chat_template = processor.chat_template

    torch.manual_seed(seed)
    rows = max(max(tokenizer.get_vocab().values()) + 1, language_model.get_input_embeddings().num_embeddings)
    language_model.resize_token_embeddings(rows, pad_to_multiple_of=_VOCABULARY_MULTIPLE)
    image_id, start_id, row_id, end_id = tokenizer.convert_tokens_to_ids(list(spelling.values()))
    head = language_model.get_output_embeddings()
    text_config = language_model.config.get_text_config(decoder=True)
    text_config.tie_word_embeddings = head.weight is language_model.get_input_embeddings().weight
    generation = _generation_config(language_model, processor)
    if set(stop_ids(text_config)) - set(stop_ids(generation)):  # often the default of its class
        text_config.eos_token_id = tokenizer.eos_token_id
    config = SoloConfig(
        text_config=text_config,
        vision_patch_size=image_processor.patch_size,
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
        image_token_id=image_id,
        vision_start_token_id=start_id,
        vision_row_token_id=row_id,
        vision_end_token_id=end_id,
        lm_head_bias=getattr(head, "bias", None) is not None,
        dtype=language_model.dtype,
        **asdict(design),
    )
    model = _assemble(language_model, config)
    complete_generation(generation, config, processor)
    model.generation_config = generation
    check_image_attention(model)
    difference = (_text_logits(model, probe)[..., : expected.shape[-1]] - expected).abs().max().item()
    if difference > _LOGITS_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise SoloError(
            f"SOLO does not reproduce the head of {type(language_model).__name__}; text logits differ by "
            f"{difference:.2g}: please report this architecture"
        )
    return SoloModelAndProcessor(model, processor, chat_template)


def _check_causality(language_model: PreTrainedModel, logits: Tensor) -> None:
    """Reject encoders, whose logits of two texts differ before the texts do, at the last token."""
    change = (logits[0, :-1] - logits[1, :-1]).abs().max().item()
    if change > _CAUSALITY_TOLERANCE * max(1.0, logits.abs().max().item()):
        raise SoloError(
            f"{type(language_model).__name__} sees later tokens, which changed its logits by {change:.2g}: "
            "it is no causal language model; choose another LLM"
        )


def _load(llm: str | Path, gguf_file: str | None, dtype: str) -> tuple[Any, PreTrainedModel]:
    source, options = str(llm), {"gguf_file": gguf_file} if gguf_file else {}
    if gguf_file and not (Path(source) / gguf_file).is_file() and Path(source).is_dir():
        raise SoloError(f"{source} has no file {gguf_file}")
    if not gguf_file:
        load_config(source)  # the tokenizer is read by it, and would be blamed for its errors
    tokenizer = load_tokenizer(source, **options)
    model = load_llm(source, dtype="auto" if dtype == "auto" else getattr(torch, dtype), **options)
    if gguf_file:
        model = _without_quantization(model, llm)
    return tokenizer, model.eval()


def _without_quantization(model: PreTrainedModel, llm: str | Path) -> PreTrainedModel:
    """Return an unquantized copy, since a model loaded from GGUF cannot be saved."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.config.name_or_path = str(llm)
    return plain


def _add_vision_tokens(tokenizer: Any) -> dict[str, str]:
    """Add the four vision tokens; return their spelling, which differs if the LLM already has the token."""
    spelling = {}
    for role, token in _VISION_TOKENS.items():
        free = token
        while tokenizer.convert_tokens_to_ids(free) not in (None, tokenizer.unk_token_id):
            free = f"<solo:{free.strip('<>')}>" if free == token else free.replace(">", "_>")
        if free != token:
            logger.warning("the LLM already has a token %s; images use %s", token, free)
        tokenizer.add_tokens([AddedToken(free, special=True, normalized=False)], special_tokens=True)
        spelling[role] = free
    return spelling


def _set_eos(tokenizer: Any, language_model: PreTrainedModel) -> None:
    """Set a missing EOS token from the model's settings."""
    if tokenizer.eos_token_id is not None:
        return
    known = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    for settings in (language_model.generation_config, language_model.config):
        for token_id in stop_ids(settings):
            if token_id in known:
                tokenizer.eos_token = known[token_id]
                # A configuration without EOS token has its class's default, which may be wrong.
                logger.warning(
                    "the tokenizer has no EOS token: the model's settings say %s (if wrong, set "
                    "eos_token in tokenizer_config.json)",
                    known[token_id],
                )
                return
    raise SoloError(
        "the LLM has no EOS token, so answers would not end: set eos_token in its tokenizer_config.json"
    )


def _own_template(tokenizer: Any) -> str | None:
    """Return the LLM's chat template; of several, the default one."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            logger.warning(
                "none of the LLM's chat templates (%s) is named default; using none", ", ".join(own)
            )
        own = own.get("default")
    return with_fixed_date(own) if own else None


def _make_control_tokens_special(tokenizer: Any, chat_template: str | None) -> None:
    """Mark tokens that the chat template writes as special, which some LLMs do not.

    Text that spells such a token then stays text, and answers do not show it. Reasoning tokens are left
    alone, since answers and training data may contain them.
    """
    if not chat_template:
        return
    try:
        rendered = render(chat_template, [_USER, _ASSISTANT] * 2, True, tokenizer.special_tokens_map)
    except Exception:  # any type; such a template will be replaced
        return
    control = [
        token
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special
        and token.content.strip()
        and token.content in rendered
        and "think" not in token.content
    ]
    for token in control:
        token.special = True
    tokenizer.add_tokens(control, special_tokens=True)


def _set_template(processor: SoloProcessor, own: str | None) -> TemplateSource:
    """Set the LLM's chat template, or a replacement if it is unsuitable for training."""
    candidates: list[tuple[TemplateSource, str]] = [("llm", own)] if own else []
    known = processor.tokenizer.get_vocab()
    if own and all(token in known for token in CHATML_TOKENS):
        candidates.append(("chatml", CHATML_TEMPLATE))
    candidates.append(("solo", SOLO_CHAT_TEMPLATE))
    source, template = candidates.pop(0)
    fault = own_fault = _use_template(processor, template)
    while fault and candidates:
        source, template = candidates.pop(0)
        fault = _use_template(processor, template)
    if own_fault:
        name = _TEMPLATE_NAMES[source]
        logger.warning("the LLM's chat template is replaced by %s: %s", name, own_fault)
    elif has_date(template):
        logger.warning("the LLM's chat template writes the current date, which is fixed to 1 January 2025")
    try:
        processor.encode_chat([_SYSTEM, *[_USER, _ASSISTANT] * 2])
    except ChatTemplateError as error:
        logger.warning("chats of several turns with a system message will be skipped: %s", error)
    if processor.drops_system:  # other software would do so in silence
        processor.chat_template = without_system(processor.chat_template)
    return source


def _use_template(processor: SoloProcessor, template: str) -> str | None:
    """Set a chat template; return the reason if it is unsuitable for training."""
    processor.chat_template = with_images(template, processor.image_token)
    try:
        for turns in (1, 2, 3):
            processor.encode_chat([_USER, _ASSISTANT] * turns)
        processor.encode_chat([_USER_WITH_IMAGE, _ASSISTANT], [(1, 1, 1)])
    except ChatTemplateError as error:
        return str(error)
    return None


@torch.no_grad()
def _assemble(language_model: PreTrainedModel, config: SoloConfig) -> SoloForConditionalGeneration:
    family = config.text_config.model_type
    try:
        with torch.device("meta"):
            model = SoloForConditionalGeneration(config)
        shapes = _shapes(model)
        kind = type(model.model.language_model)
        decoder = next((part for part in language_model.modules() if type(part) is kind), None)
        if decoder is None:
            raise SoloError(f"{family} has no decoder that works by itself: choose another LLM")
        model.model.set_decoder(decoder)
    except ValueError as error:
        raise SoloError(first_line(error)) from error
    model.lm_head = language_model.get_output_embeddings()
    tokens = language_model.get_input_embeddings().weight
    model.model.embed_vision_patch = make_patch_embedding(config).to(tokens.dtype)
    if differing := sorted(_shapes(model) ^ shapes):
        raise SoloError(
            f"{family} cannot take new tokens; the size of {differing[0][0]} does not follow the vocabulary: "
            "choose another LLM"
        )
    embedded = model.model.embed_tokens(torch.arange(len(tokens), device=tokens.device))
    _initialize(model.model.embed_vision_patch, embedded)
    model.tie_weights()
    return model.eval()


def _shapes(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def _initialize(patch_embedding: nn.Module, tokens: Tensor) -> None:
    """Draw weights that keep unit variance up to the last layer, whose outputs get that of the tokens."""
    layers = [layer for layer in patch_embedding.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers:
        gain = tokens.float().std().item() if layer is layers[-1] else 1.0
        layer.weight.normal_(std=gain / layer.weight[0].numel() ** 0.5)
        if layer.bias is not None:
            layer.bias.zero_()


def _generation_config(language_model: PreTrainedModel, processor: SoloProcessor) -> GenerationConfig:
    """Return greedy settings with the LLM's EOS tokens and suppressed tokens.

    Raises:
        SoloError: The LLM restricts its answers in a way that is neither, or forbids an end.
    """
    own, tokenizer = language_model.generation_config, processor.tokenizer
    for name in _UNSUPPORTED:
        if value := getattr(own, name, None):
            raise SoloError(
                f"{name} = {value} of the LLM's generation_config.json is not supported: remove it, or list "
                "tokens to forbid in suppress_tokens"
            )
    if stray := stray_stops(own, tokenizer, processor.end_of_turn_ids):
        logger.warning("the LLM stops at %s, where no answer ends: left out", named(tokenizer, stray))
    known = set(tokenizer.get_vocab().values())  # ids beyond them are never generated
    forbid = {name: getattr(own, name, None) for name in _FORBID}
    for name, tokens in forbid.items():
        if unknown := set(tokens or ()) - known:
            raise SoloError(
                f"{name} of the LLM's generation_config.json has {min(unknown)}, which is no token: remove it"
            )
    settings = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[end for end in stop_ids(own, processor) if end in known and end not in stray],
        pad_token_id=tokenizer.pad_token_id,
        **forbid,
    )
    if fault := stop_fault(settings, tokenizer, processor.end_of_turn_ids):
        raise SoloError(f"the LLM's generation_config.json: {fault}")
    return settings


@torch.no_grad()
def _text_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits.float()
