"""Two-dimensional positions: coordinates by brute force, and equality of all paths with all designs."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.factories import SIZES, TEXTS, ask, make_llm, png
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
    SmolLM3Config,
)

from solo_vlm.check.tiny import tiny_config
from solo_vlm.data.collate import collate
from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.generate.cache import PrefixCache
from solo_vlm.generate.exactness import cache_error, tolerance
from solo_vlm.generate.pipeline import GenerationPipeline
from solo_vlm.models.from_llm import ImageDesign, compose
from solo_vlm.models.load import load_model
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.positions_solo import image_layout, rotated_by, use_2d_positions
from solo_vlm.quickstart.llm import train_tokenizer
from solo_vlm.utils.errors import SoloError

PATCH, START, SEPARATOR, END, TEXT = 1, 2, 3, 4, 9
IDS = (PATCH, START, SEPARATOR, END)
ANSWER = [{"role": "assistant", "content": [{"type": "text", "text": "a blue square"}]}]

FAMILIES = {
    "llama": lambda **sizes: LlamaConfig(tie_word_embeddings=True, **sizes),
    "qwen3": lambda **sizes: Qwen3Config(**sizes),
    "gemma3": lambda **sizes: Gemma3TextConfig(sliding_window=8, **sizes),  # two bases, by layer type
    "phi3": lambda **sizes: Phi3Config(partial_rotary_factor=0.5, **sizes),
    "smollm3": lambda **sizes: SmolLM3Config(no_rope_layers=[1, 0], **sizes),
    "cohere": lambda **sizes: CohereConfig(**sizes),  # frequencies in pairs
    "yarn": lambda **sizes: LlamaConfig(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, **sizes
    ),
}
DESIGNS = [
    ImageDesign(attention, positions, base if positions == "2d" else None, embedding)
    for attention, positions, embedding, base in product(
        ("causal", "bidirectional"), ("1d", "2d"), ("linear", "conv"), (10000.0,)
    )
]


def make_text_llm(family, seed=0):
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {**SIZES, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "pad_token_id": None, **special}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[family](**sizes)).eval(), tokenizer


def make(family, design, seed=0):
    solo = compose(*make_text_llm(family, seed), seed=seed, design=design)
    for weight in solo.model.model.embed_vision_patch.parameters():
        weight.data.mul_(4.0)  # so that images matter
    return solo


def noise(width, height, seed):
    return png(Image.effect_noise((width, height), 60 + seed).convert("RGB"))


def documents_of(solo):
    encoder = Encoder(solo.processor)
    chats = [
        ask("what is this?", noise(64, 96, 1)),
        ask("a red circle"),
        ask("compare", noise(64, 64, 2), noise(96, 32, 3)),
    ]
    return [encoder(parse_sample({"messages": chat + ANSWER})) for chat in chats]


@st.composite
def rows(draw):
    """Return a packed row of documents, and each token's position, row and column by counting."""
    tokens, indices, expected = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        position = index = 0
        for image in draw(st.lists(st.booleans(), min_size=1, max_size=5)):
            if not image:
                tokens.append(TEXT)
                expected.append((position, 0, 0))
                position += 1
                continue
            height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
            tokens.append(START)
            expected.append((position, 0, 0))
            position += 1
            for row in range(height):
                cells = [PATCH] * width + [SEPARATOR] * (row + 1 < height)
                tokens += cells
                expected += [(position, row, column) for column in range(len(cells))]
            position += max(height, width + (height > 1))
            tokens.append(END)
            expected.append((position, 0, 0))
            position += 1
        indices += range(index, index + len(tokens) - len(indices))
    return tokens, indices, expected


@given(rows())
def test_layout_equals_counting(row):
    tokens, indices, expected = row
    index = torch.tensor(indices)
    shift, rows, columns = image_layout(torch.tensor(tokens)[None], IDS, index[None])[1:, 0]
    assert list(zip((index + shift).tolist(), rows.tolist(), columns.tolist(), strict=True)) == expected


def test_left_padding_does_not_move_an_image():
    row = [TEXT, START, PATCH, PATCH, SEPARATOR, PATCH, PATCH, END, TEXT]
    alone = image_layout(torch.tensor([row]), IDS)
    padded = image_layout(torch.tensor([[0, 0, 0, *row]]), IDS)
    assert torch.equal(padded[..., 3:], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_logits_equal_the_llm_to_the_bit_with_every_design(family):
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    llm, _ = make_text_llm(family)
    with torch.no_grad():
        expected = llm(input_ids=ids, use_cache=False).logits
        for design in DESIGNS:
            logits = make(family, design).model(input_ids=ids, use_cache=False).logits
            assert torch.equal(logits[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_packed_documents_equal_documents_alone(family, design):
    solo = make(family, design)
    documents = documents_of(solo)
    solo.model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = [
            solo.model(
                input_ids=torch.tensor(d.input_ids)[None],
                pixel_values=torch.tensor(d.pixel_values),
                use_cache=False,
            ).logits[0]
            for d in documents
        ]
    isolate_documents(solo.model)
    batch = {name: value for name, value in collate(documents, 192, 0).items() if name != "labels"}
    with torch.no_grad():
        packed = solo.model(**batch, use_cache=False).logits[0]
    expected = torch.cat(alone)
    torch.testing.assert_close(packed[: len(expected)], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_cached_answers_equal_recomputed_ones(family, design, picture):
    """In a batch with padding, through the prefix cache, and without any cache."""
    solo = make(family, design)
    chats = [ask("what is this?", picture(96, 64)), ask("a red circle"), ask("why?", picture(64, 64))]
    pipeline = GenerationPipeline(solo.model, solo.processor)
    alone = [recomputed(solo, chat, 6) for chat in chats]
    assert pipeline.answer(chats, 6) == alone
    warm = GenerationPipeline(solo.model, solo.processor, PrefixCache())
    assert [warm.answer([chat], 6)[0] for chat in chats + chats] == alone + alone


def test_decoder_that_rotates_cached_keys_again_gives_uncached_answers():
    """Qwen 4 keeps the positions of cached tokens for its indexer."""
    model = compose(*make_llm("qwen4_exp_text"), design=ImageDesign(image_positions="2d")).model
    assert cache_error(model) < tolerance(model)


def test_layout_shorter_than_the_rotated_tokens_is_an_error():
    layout = torch.zeros(4, 1, 1, dtype=torch.long)
    with rotated_by(layout), pytest.raises(ValueError, match="rotates 3 tokens, but the layout has 1"):
        rotary = with_2d_positions(tiny_config("llama")).rotary_emb
        rotary(torch.zeros(1, 3, 1), position_ids=torch.arange(3)[None])


@pytest.mark.parametrize("design", [ImageDesign("bidirectional"), ImageDesign(image_positions="2d")], ids=str)
def test_sequence_without_its_cached_tokens_is_rejected(design, picture):
    solo = make("llama", design)
    inputs = GenerationPipeline(solo.model, solo.processor).encode([ask("what is this?", picture(96, 64))])
    with pytest.raises(ValueError, match="need the whole sequence as input_ids, with the 5 tokens"):
        solo.model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=5)


def recomputed(solo, chat, length):
    pipeline = GenerationPipeline(solo.model, solo.processor)
    inputs = pipeline.encode([chat])
    ids, start = inputs["input_ids"], inputs["input_ids"].shape[1]
    suppressed = solo.model.generation_config.suppress_tokens
    for _ in range(length):
        with torch.no_grad():
            logits = solo.model(
                input_ids=ids, pixel_values=inputs.get("pixel_values"), use_cache=False
            ).logits
        logits[..., suppressed] = -torch.inf
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if int(ids[0, -1]) in pipeline.eos_token_ids:
            break
    return solo.processor.batch_decode(ids[:, start:], skip_special_tokens=True)[0].strip()


def test_swapped_rows_and_columns_differ_only_with_2d_positions():
    """A patch that moves within its image changes what the text after it reads."""
    for positions in ("1d", "2d"):
        solo = make("llama", ImageDesign(image_positions=positions))
        ids = torch.tensor([[5, *grid(solo, 2, 3), 6, 7]])
        other = torch.tensor([[5, *grid(solo, 3, 2), 6, 7]])
        patches = torch.randn(6, solo.model.config.patch_dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            one, two = (solo.model(input_ids=i, pixel_values=patches).logits[0, -1] for i in (ids, other))
        assert not torch.allclose(one, two)


def grid(solo, height, width):
    patch, start, separator, end = solo.model.config.vision_token_ids
    cells = [[patch] * width for _ in range(height)]
    inner = cells[0]
    for row in cells[1:]:
        inner = [*inner, separator, *row]
    return [start, *inner, end]


ROTARY = (
    *("llama", "qwen3", "gemma3_text", "gemma4_text", "phi3", "cohere", "glm4", "gpt_neox", "gpt_oss"),
    *("llama4_text", "deepseek_v2", "deepseek_v3", "qwen3_5_text", "qwen3_next", "smollm3", "olmo3"),
)


@pytest.mark.parametrize("family", ROTARY)
def test_each_frequency_follows_its_own_coordinate(family):
    """The truth is each family's own module at the position of one axis."""
    config = tiny_config(family)
    plain, wrapped = (
        next(m for m in model.modules() if "Rotary" in type(m).__name__)
        for model in (AutoModel.from_config(config), with_2d_positions(config))
    )
    names = [name for name, _ in plain.named_buffers() if "original" not in name]
    text, row, column = 7, 3, 5
    for name in names:
        options = {} if name == "inv_freq" else {"layer_type": name.removesuffix("_inv_freq")}
        frequencies = getattr(plain, name)
        of_text, of_row, of_column, one = (
            angles_of(plain, position, **options) for position in (text, text + row, text + column, 1)
        )
        axis = torch.arange(len(frequencies)) % 3
        axis[3 * (len(frequencies) * 5 // 16) :] = 0
        nearest = (one[:, None] - frequencies).abs().argmin(-1)  # all are less than pi
        expected = torch.stack([of_text, of_row, of_column])[axis[nearest], range(len(nearest))]
        with rotated_by(torch.tensor([[[0]], [[text - 2]], [[row]], [[column]]])):
            found = angles_of(wrapped, 2, **options)
        difference = torch.remainder(found - expected + torch.pi, 2 * torch.pi) - torch.pi
        assert difference.abs().max() < 1e-4


def with_2d_positions(config):
    decoder = AutoModel.from_config(config)
    use_2d_positions(decoder, config, None)
    return decoder


def angles_of(rotary, position, **options):
    output = rotary(torch.zeros(1, 1, 1), position_ids=torch.tensor([[position]]), **options)
    return (output.angle() if isinstance(output, torch.Tensor) else torch.atan2(output[1], output[0]))[0, 0]


@pytest.mark.parametrize("family", ["gpt2", "opt", "mpt"])
def test_families_without_rope_are_refused_in_one_line(family):
    config = tiny_config(family)
    with pytest.raises(ValueError, match="image_positions=2d needs rotary position embeddings"):
        use_2d_positions(AutoModel.from_config(config), config, None)


def test_base_without_2d_positions_is_refused():
    with pytest.raises(SoloError, match="rope_base_2d has no effect on 1-D positions"):
        ImageDesign(rope_base_2d=10000.0)


def test_model_with_2d_positions_loads_in_16_bits(tmp_path):
    compose(*make_llm(), design=ImageDesign(image_positions="2d")).save(tmp_path / "model")
    assert load_model(tmp_path / "model", "bfloat16", "cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["image_attention", "image_positions", "patch_embedding"])
def test_unknown_design_in_a_configuration_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} = '2D': expected "):
        SoloConfig(**{name: "2D"})


@pytest.mark.parametrize("base", [0, -5, 1.0, float("inf"), "100", True])
def test_impossible_base_in_a_configuration_is_an_error(base):
    with pytest.raises(ValueError, match=f"rope_base_2d = {base} must be a number above 1"):
        SoloConfig(image_positions="2d", rope_base_2d=base)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rope_base_2d": 100.0}, "no effect on 1-D positions"),
        ({"vision_patch_size": 33, "patch_embedding": "conv"}, "vision_patch_size = 33 is odd"),
        ({"vision_patch_size": 0}, "vision_patch_size = 0 is no positive"),
        ({"vision_row_token_id": 32000}, "not four different tokens"),
        ({"vision_end_token_id": -1}, "not four different tokens"),
        ({"image_mean": [0.5, 0.5]}, "image_mean=.* not three finite numbers"),
        ({"image_std": [1.0] * 4}, "image_std=.* not three finite numbers"),
    ],
    ids=str,
)
def test_settings_of_images_that_cannot_be_are_errors(settings, reason):
    with pytest.raises(ValueError, match=reason):
        SoloConfig(**settings)


def test_earlier_name_of_bidirectional_images_is_read():
    assert SoloConfig(bidirectional_images=True).image_attention == "bidirectional"
    assert SoloConfig(bidirectional_images=False).image_attention == "causal"
