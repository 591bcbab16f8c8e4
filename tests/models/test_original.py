"""Image layout "original": the tokens that SOLO-7B was fine-tuned on, computed with SentencePiece."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.convert.original_files import CHAT, LOCATIONS, TEXT_TOKENS, VISION, write_sentencepiece
from tests.factories import ask

from solo_vlm.models.original import original_processor, original_tokenizer
from solo_vlm.models.solo.processing_solo import SoloProcessor

START, PATCH, ROW, _, END = range(TEXT_TOKENS, TEXT_TOKENS + 5)
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_sentencepiece(folder, VISION + LOCATIONS + CHAT)
    return folder


@pytest.fixture(scope="module")
def pieces(folder):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def processor(folder) -> SoloProcessor:
    return original_processor(original_tokenizer(folder), patch_size=32, layout="original")


def image(rows: int, columns: int, close: int = START) -> list[int]:
    """Return `<vision>`, rows of `<vpatch>` separated by `<vrow_sep>`, and `<vision>` again."""
    between = [ROW, *[PATCH] * columns]
    return [START, *[PATCH] * columns, *between * (rows - 1), close]


def turns(pieces, *texts: str) -> tuple[list[int], list[bool]]:
    """Tokenize in the original fine-tuning format: separate turns, stripped questions, EOS after answers."""
    ids, supervised = [], []
    for number, text in enumerate(texts):
        if number % 2 == 0:
            own = [BOS] * (number == 0) + pieces.encode(f"[INST] {text.strip()} [/INST]")
        else:
            own = [*pieces.encode(text), EOS]
        ids += own
        supervised += [number % 2 == 1] * len(own)
    return ids, supervised


def chat(*texts: str, image_in: int | None = None) -> list[dict]:
    messages = []
    for number, text in enumerate(texts):
        parts = [{"type": "text", "text": text}]
        if image_in == number:
            parts.insert(0, {"type": "image"})
        messages.append({"role": ("user", "assistant")[number % 2], "content": parts})
    return messages


TEXTS = ["\nwhat is this? ", "a red circle", "  and  that", "two dogs\non a mat", "hello", "yes"]


@pytest.mark.parametrize("num_turns", [2, 4, 6])
def test_chats_are_tokenized_as_by_the_original_code(processor, pieces, num_turns):
    texts = TEXTS[:num_turns]
    encoded = processor.encode_chat(chat(*texts, image_in=0), [(1, 2, 3)])
    ids, supervised = turns(pieces, *texts)
    layout = image(2, 3)
    assert encoded.input_ids.tolist() == layout + ids
    assert encoded.supervised.tolist() == [False] * len(layout) + supervised


def test_text_only_chats(processor, pieces):
    ids, supervised = turns(pieces, *TEXTS)
    encoded = processor.encode_chat(chat(*TEXTS))
    assert (encoded.input_ids.tolist(), encoded.supervised.tolist()) == (ids, supervised)


def test_prompt_ends_where_the_answer_begins(processor, pieces):
    prompt = processor.encode_chat(chat("what is this?", image_in=0), [(1, 1, 1)], add_generation_prompt=True)
    assert prompt.input_ids.tolist() == image(1, 1) + turns(pieces, "what is this?")[0]


def test_image_of_a_later_turn_precedes_that_turn(processor, pieces):
    encoded = processor.encode_chat(chat(*TEXTS[:4], image_in=2), [(1, 1, 2)])
    first, second = turns(pieces, *TEXTS[:2])[0], turns(pieces, *TEXTS[:4])[0]
    assert encoded.input_ids.tolist() == first + image(1, 2) + second[len(first) :]


@settings(deadline=None, max_examples=50)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\ue000\ue001"), max_size=30)
)
def test_any_text_is_tokenized_like_sentencepiece(text, processor, pieces):
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert ids == pieces.encode(text.replace("\x00", "\x00"))


@pytest.mark.parametrize("spelled", ["</s>", "<vision>", "<vpatch>", "</vision>"])
def test_text_that_spells_a_special_token_is_not_parsed(processor, spelled):
    encoded = processor.encode_chat(chat(f"say {spelled} now", "yes")).input_ids.tolist()
    assert encoded.count(EOS) == 1
    assert not {START, PATCH, ROW, END} & set(encoded)


def test_prompt_string_and_chat_give_the_same_tokens(processor, picture):
    photo = picture(96, 40)
    messages = ask("what is this?", photo)
    encoded = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<vpatch><s>[INST] what is this? [/INST]"
    plain = processor(text=prompt, images=[photo], add_special_tokens=False)
    assert plain["input_ids"][0] == encoded["input_ids"]
    np.testing.assert_array_equal(plain["pixel_values"], encoded["pixel_values"])


def test_layout_is_saved_and_can_be_chosen_on_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    question = chat("what is this?", image_in=0)
    for layout, close in ((None, START), ("original", START), ("paper", END)):
        again = SoloProcessor.from_pretrained(tmp_path, **({"image_layout": layout} if layout else {}))
        assert again.image_layout == (layout or "original")
        ids = again.encode_chat(question, [(1, 1, 2)], add_generation_prompt=True).input_ids.tolist()
        assert ids.index(BOS) == (4 if close == START else 0)
        assert again.image_input_ids(1, 2).tolist() == image(1, 2, close)
        again.save_pretrained(tmp_path / f"{layout}")
        assert SoloProcessor.from_pretrained(tmp_path / f"{layout}").image_layout == again.image_layout


def test_new_models_have_the_paper_layout(solo, processor):
    assert solo.processor.image_layout == "paper"
    with pytest.raises(ValueError, match='"paper" or "original"'):
        SoloProcessor(processor.image_processor, processor.tokenizer, image_layout="neat")
