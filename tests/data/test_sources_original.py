"""The original pre-training data as sources: JSON Lines in four formats, and Megatron's packed files."""

from __future__ import annotations

import base64
import gzip
import json
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.convert.original_files import CHAT, LOCATIONS, TEXT_TOKENS, VISION, write_sentencepiece
from tests.factories import png

from solo_vlm.data.encode import draft, encode
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.sources import open_source
from solo_vlm.models.original import original_processor, original_tokenizer
from solo_vlm.utils.errors import SoloError

START, PATCH, ROW, _, END = range(TEXT_TOKENS, TEXT_TOKENS + 5)
BOS, PACK_SEPARATOR = 1, 1000
SYSTEM, USER, ASSISTANT, IMAGE = range(4)


def turn(role: str, *content) -> dict:
    return {"role": role, "content": list(content)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def base64_image(image: Image.Image) -> dict:
    data = base64.b64encode(png(image)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


# --- JSON lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_all_row_formats_give_the_same_sample(compressed, tmp_path, picture, solo):
    document = turn("assistant", base64_image(picture(64, 32)), text("a red circle"))
    rows = [
        {"messages": [document]},
        {"id": "7", "conversations": [document]},
        [document],
        document,
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = tmp_path / ("shard.jsonl.gz" if compressed else "shard.jsonl")
    file.write_bytes(gzip.compress(lines) if compressed else lines)
    source = open_source(file)
    read = [source.read(0)[number] for number in range(4)]
    encoded = [encode(parse_sample(row), solo.processor) for row in read]
    for other in encoded[1:]:
        np.testing.assert_array_equal(other.input_ids, encoded[0].input_ids)
        np.testing.assert_array_equal(other.labels, encoded[0].labels)
        np.testing.assert_array_equal(other.pixel_values, encoded[0].pixel_values)
    assert encoded[0].image_grid_thw.tolist() == [[1, 1, 2]]
    assert parse_sample(read[1]).id == "7"


def test_text_only_rows_and_chats_are_read(tmp_path, picture):
    rows = [
        {"role": "assistant", "content": "only text, as a string"},
        {
            "id": 1,
            "conversations": [
                turn("user", text("what?"), base64_image(picture())),
                turn("assistant", text("it")),
            ],
        },
        {"messages": [turn("user", text("hello")), turn("assistant", text("yes"))], "source": "x"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [parse_sample(row) for row in open_source(tmp_path / "data.jsonl").read(0)]
    assert samples[0].messages[0]["content"] == [text("only text, as a string")]
    assert [message["role"] for message in samples[1].messages] == ["user", "assistant"]
    assert len(samples[1].images) == 1
    assert len(samples[2].messages) == 2


def test_other_rows_are_left_to_schema_validation(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "x"}]}, {"text": "y"}, [1], [], "z"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard = open_source(tmp_path / "data.jsonl").read(0)
    for number in range(len(rows)):
        with pytest.raises(SampleError):
            parse_sample(shard[number])


# --- packed sets ----------------------------------------------------------------------------------------


def write_indexed(prefix: Path, arrays: list, dtype: type, code: int) -> None:
    """Write a .bin and .idx pair, field by field."""
    arrays = [np.asarray(array, dtype=dtype) for array in arrays]
    Path(f"{prefix}.bin").write_bytes(b"".join(array.tobytes() for array in arrays))
    offsets = np.cumsum([0, *[array.nbytes for array in arrays]])[:-1]
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code))
        file.write(struct.pack("<QQ", len(arrays), 1))
        file.write(np.array([array.size for array in arrays], dtype=np.int32).tobytes())
        file.write(offsets.astype(np.int64).tobytes())
        file.write(np.array([0], dtype=np.int64).tobytes())


class Packer:
    """Encoder and packer like the original preprocessing."""

    def __init__(self, pieces) -> None:
        self.pieces = pieces
        self.packs: list[tuple[list, list, list, list]] = []

    def pack(self, *documents) -> None:
        tokens, roles, indices, patches = [], [], [], []
        for number, document in enumerate(documents):
            if number:
                tokens.append(BOS)
                roles.append(PACK_SEPARATOR)
                indices.append(-1)
            for role, part in document:
                if isinstance(part, str):
                    ids = self.pieces.encode(part)
                    tokens += ids
                    roles += [role] * len(ids)
                    indices += [-1] * len(ids)
                    continue
                values = (np.asarray(part) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
                rows, columns = part.height // 32, part.width // 32
                tokens.append(START)
                roles.append(role)
                indices.append(-1)
                for row in range(rows):
                    if row:
                        tokens.append(ROW)
                        roles.append(role)
                        indices.append(-1)
                    for column in range(columns):
                        tokens.append(PATCH)
                        roles.append(IMAGE)
                        indices.append(len(patches))
                        tile = values[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
                        patches.append(tile.transpose(2, 0, 1).ravel().astype(np.float16))
                tokens.append(END)
                roles.append(role)
                indices.append(-1)
        self.packs.append((tokens, roles, indices, np.concatenate([np.empty(0), *patches])))

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        tokens, roles, indices, patches = zip(*self.packs, strict=True)
        write_indexed(folder / "data-text", tokens, np.uint16, 8)
        write_indexed(folder / "data-role", roles, np.uint16, 8)
        write_indexed(folder / "data-vision_patch_indices", indices, np.int32, 4)
        write_indexed(folder / "data-vision_patch", patches, np.float16, 10)
        (folder / "data.jsonl").write_text('{"n_tokens": 5}\n')
        return folder


@pytest.fixture
def packer(tmp_path) -> Packer:
    return Packer(write_sentencepiece(tmp_path / "data", VISION + LOCATIONS + CHAT))


@pytest.fixture
def photos(picture) -> list[Image.Image]:
    return [picture(96, 64, seed=1), picture(32, 32, seed=2), picture(64, 128, seed=3)]


def read_all(source) -> list[dict]:
    return [source.read(shard)[row] for shard in range(len(source)) for row in range(len(source.read(shard)))]


def test_every_level_of_a_pixel_survives_float16():
    from solo_vlm.data.sources.megatron_indexed import _pixels

    levels = np.arange(256)
    mean, std = np.array([[0.485], [0.456], [0.406]]), np.array([[0.229], [0.224], [0.225]])
    stored = ((levels / 255 - mean) / std).astype(np.float16)
    np.testing.assert_array_equal(_pixels(stored[None, :, :, None])[0, :, :, 0], np.tile(levels, (3, 1)))


def test_packs_are_unpacked_to_the_original_documents(packer, photos, tmp_path):
    documents = [
        [(ASSISTANT, photos[0]), (ASSISTANT, "a red circle")],
        [(ASSISTANT, "only text. héllo")],
        [(ASSISTANT, "before"), (ASSISTANT, photos[1]), (ASSISTANT, photos[2]), (ASSISTANT, "after  it")],
        [(USER, "what is this?\n"), (USER, photos[1]), (ASSISTANT, "two dogs")],
    ]
    packer.pack(*documents[:3])
    packer.pack(documents[3])
    source = open_source(packer.write(tmp_path / "data"))
    assert len(source) == 2
    rows = read_all(source)
    for row, document in zip(rows, documents, strict=True):
        names = {USER: "user", ASSISTANT: "assistant"}
        parts = [(message["role"], part) for message in row["messages"] for part in message["content"]]
        assert [role for role, _ in parts] == [names[role] for role, _ in document]
        for (_, part), (_, original) in zip(parts, document, strict=True):
            if isinstance(original, str):
                assert part == text(original)
            else:
                image = Image.open(BytesIO(part["image"]))
                np.testing.assert_array_equal(np.asarray(image), np.asarray(original))
    assert "pack 0, document 2" in source.where(0, 2)


def test_reencoding_reproduces_the_original_tokens_and_patches(packer, photos, tmp_path):
    packer.pack([(ASSISTANT, photos[0]), (ASSISTANT, "a red circle")], [(ASSISTANT, "hello world")])
    folder = packer.write(tmp_path / "data")
    processor = original_processor(original_tokenizer(folder), patch_size=32, layout="paper")
    tokens, roles, _, patches = packer.packs[0]
    cut = roles.index(PACK_SEPARATOR)
    first, second = (encode(parse_sample(row), processor) for row in read_all(open_source(folder)))
    assert first.input_ids.tolist() == [BOS, *tokens[:cut], 2]
    assert second.input_ids.tolist() == [BOS, *tokens[cut + 1 :], 2]
    again = processor.image_processor(photos[0], do_rescale=True, do_normalize=True)["pixel_values"]
    np.testing.assert_allclose(np.asarray(again).ravel(), patches.astype(np.float32), atol=2e-3)
    np.testing.assert_array_equal(first.pixel_values, processor.image_processor(photos[0])["pixel_values"])


def test_image_cut_by_the_packer_is_a_broken_row(packer, photos, tmp_path):
    packer.pack([(ASSISTANT, "a cat"), (ASSISTANT, photos[0])])
    packer.pack([(ASSISTANT, photos[0]), (ASSISTANT, "a cat")])
    packer.pack([(ASSISTANT, "hello")])
    for pack, kept in ((0, slice(None, -3)), (1, slice(3, None))):
        tokens, roles, indices, patches = packer.packs[pack]
        packer.packs[pack] = (tokens[kept], roles[kept], indices[kept], patches)
    source = open_source(packer.write(tmp_path / "data"))
    for shard in (0, 1):
        with pytest.raises(SampleError, match="cut-image"):
            source.read(shard)[0]
    assert source.read(2)[0]["messages"][0]["content"] == [text("hello")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "data-role.bin").unlink(), "data-role.bin is missing"),
        (lambda f: (f / "data-vision_patch.idx").unlink(), "data-vision_patch.idx is missing"),
        (lambda f: (f / "data-text.bin").write_bytes(b"12"), "data-text.bin is truncated"),
        (lambda f: (f / "data-text.idx").write_bytes(b"MMIDIDX"), "not an index"),
        (lambda f: cut(f / "data-role.idx", 40), "data-role.idx is truncated"),
        (lambda f: (f / "data-text.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(60)), "not an index"),
        (lambda f: write_indexed(f / "data-role", [[2]], np.uint16, 8), "differ in length"),
        (
            lambda f: write_indexed(f / "data-vision_patch", [], np.float16, 10),
            "1 packs of text, but 0 of patches",
        ),
        (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer.model"),
        (
            lambda f: (f / "data-vision_patch.bin").rename(f / "data-vision_patch.bin.lz4"),
            "decompress it first .lz4 -d",
        ),
    ],
)
def test_broken_sets_are_reported(packer, photos, tmp_path, damage, message):
    packer.pack([(ASSISTANT, photos[1]), (ASSISTANT, "a red circle")])
    folder = packer.write(tmp_path / "data")
    before = open_source(folder).fingerprint()
    damage(folder)
    with pytest.raises(SoloError, match=message):
        open_source(folder)
    assert before


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def test_mixture_streams_packed_sets(packer, photos, tmp_path):
    from solo_vlm.data.streams import MixtureItem, VirtualStream

    for number in range(4):
        packer.pack([(ASSISTANT, photos[number % 3]), (ASSISTANT, "a red circle")], [(ASSISTANT, "hello")])
    folder = packer.write(tmp_path / "data")
    processor = original_processor(original_tokenizer(folder), patch_size=32, layout="paper")
    mixture = [MixtureItem(open_source(folder))]
    stream = VirtualStream(0, 1, mixture, lambda sample: draft(sample, processor), length=128, epochs=1)
    assert sum(len(packed.documents) for packed in stream) == 8
