"""The packed data of the original SOLO code in Megatron's indexed files, unpacked into chats.

A set is four pairs of files, PREFIX-text, -role, -vision_patch and -vision_patch_indices (.bin and .idx). An
array is a pack: documents separated by a BOS of role PACK_SEP. Patches are normalized pixels in float16,
which distinguishes all 256 levels, so images are restored exactly.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources.files import DataFile, file_system, find_files, fingerprint
from solo_vlm.data.sources.retries import retried
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

TEXT_INDEX = "-text.idx"
_FEATURES = ("text", "role", "vision_patch", "vision_patch_indices")
_ROLES = {0: "system", 1: "user", 2: "assistant"}
_PACK_SEPARATOR = 1000
_PATCH_SIZE = 32
_PATCH_DIM = 3 * _PATCH_SIZE**2
_VISION_TOKENS = ("<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>")


class MegatronIndexedSource:
    """Rows of the original SOLO data; a shard is a pack, a row is one of its documents.

    Texts are decoded with the `tokenizer.model` that encoded them, which must be next to the data or one
    folder above. So any model can be trained on the data, and documents are packed again.

    Args:
        name: Name of the source in messages.
        files: The `-text.idx` file of each set.

    Raises:
        SoloError: A file or the tokenizer is missing or broken, or the files of a set do not match.
    """

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._sets = [_PackedSet(file) for file in files]
        self._files = [file for packed in self._sets for file in packed.files]
        self._ends = np.cumsum([len(packed) for packed in self._sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, shard: int) -> Sequence[dict[str, Any]]:
        """Return all documents of a pack; accessing one with a cut image raises SampleError."""
        return _Documents(*self._place(shard))

    def memory(self, shard: int) -> int:
        """Return the size of a pack's tokens, with role and patch index; patches are read row by row."""
        packed, pack = self._place(shard)
        return 3 * 8 * int(packed.text.sizes[pack])

    def where(self, shard: int, row: int) -> str:
        """Name files, pack and document."""
        packed, pack = self._place(shard)
        return f"{packed.prefix}, pack {pack}, document {row}"

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and contents."""
        return fingerprint(self._files)

    def _place(self, shard: int) -> tuple[_PackedSet, int]:
        """Return the set of a shard, and the number of its pack there."""
        number = int(np.searchsorted(self._ends, shard, side="right"))
        packed = self._sets[number]
        return packed, shard - int(self._ends[number]) + len(packed)


class _PackedSet:
    """The four indexed files of a set, and the tokenizer that its text was encoded with."""

    def __init__(self, text_index: DataFile) -> None:
        self.prefix = text_index.url.removesuffix(TEXT_INDEX)
        pairs = {feature: self._pair(feature) for feature in _FEATURES}
        self.files = [file for pair in pairs.values() for file in pair]
        self.text, self.role, self.patch, self.patch_index = (IndexedFile(*pair) for pair in pairs.values())
        for other in (self.role, self.patch_index):
            if not np.array_equal(other.sizes, self.text.sizes):
                raise SoloError(f"{self.prefix}: its text, roles and patch indices differ in length")
        if len(self.patch) != len(self.text):
            raise SoloError(
                f"{self.prefix}: {len(self.text)} packs of text, but {len(self.patch)} of patches"
            )
        self.tokenizer = self._tokenizer(text_index.folder)
        self.vision_ids = [self.tokenizer.piece_to_id(token) for token in _VISION_TOKENS]

    def __len__(self) -> int:
        return len(self.text)

    def _pair(self, feature: str) -> tuple[DataFile, DataFile]:
        index, data = (f"{self.prefix}-{feature}.{suffix}" for suffix in ("idx", "bin"))
        if not _exists(data) and _exists(f"{data}.lz4"):
            raise SoloError(
                f"{data}.lz4 does not support random access: decompress it first (lz4 -d {data}.lz4)"
            )
        for file in (index, data):
            if not _exists(file):
                raise SoloError(f"{file} is missing")
        return find_files(index, ())[0], find_files(data, ())[0]

    def _tokenizer(self, folder: str) -> SentencePieceProcessor:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise SoloError(f"{self.prefix} needs sentencepiece: pip install 'solo-vlm[train]'") from error
        for place in (folder, folder.rpartition("/")[0]):
            if _exists(f"{place}/tokenizer.model"):
                with find_files(f"{place}/tokenizer.model", ())[0].open() as stream:
                    return SentencePieceProcessor(model_proto=stream.read())
        raise SoloError(f"{folder} has no tokenizer.model: copy the one that {self.prefix} was encoded with")


class _Documents(Sequence[dict[str, Any]]):
    """Documents of a pack; a document's patches are read when it is accessed."""

    def __init__(self, packed: _PackedSet, pack: int) -> None:
        self._set = packed
        self._pack = pack
        self._tokens = packed.text.read(pack).astype(np.int64)
        self._roles = packed.role.read(pack).astype(np.int64)
        self._patch_index = packed.patch_index.read(pack).astype(np.int64)
        separators = np.flatnonzero(self._roles == _PACK_SEPARATOR)
        starts, ends = [0, *(separators + 1)], [*separators, len(self._tokens)]
        self._spans = [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        parts = self._parts(*self._spans[index])
        return {
            "messages": [
                {"role": role, "content": [part for _, part in of_role]}
                for role, of_role in groupby(parts, key=lambda part: part[0])
            ]
        }

    def _parts(self, start: int, end: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (role, content part), in order."""
        opening, patch, row_separator, _, closing = self._set.vision_ids
        vision = np.isin(self._tokens, self._set.vision_ids)
        while start < end:
            if vision[start] and self._tokens[start] != opening:
                raise SampleError("cut-image", "an image was cut by the packer")
            role = self._role(start)
            if vision[start]:
                closed = np.flatnonzero(self._tokens[start:end] == closing)
                if not len(closed):
                    raise SampleError("cut-image", "an image was cut by the packer")
                stop = start + int(closed[0])
                image = self._tokens[start:stop]
                rows = 1 + int((image == row_separator).sum())
                patches = self._patch_index[start:stop][image == patch]
                yield role, {"type": "image", "image": self._image(patches, rows)}
                start = stop + 1
            else:
                same = ~vision[start:end] & (self._roles[start:end] == self._roles[start])
                stop = end if same.all() else start + int(np.argmin(same))
                text = self._set.tokenizer.decode(self._tokens[start:stop].tolist())
                yield role, {"type": "text", "text": text}
                start = stop

    def _role(self, position: int) -> str:
        if (role := int(self._roles[position])) not in _ROLES:
            raise SampleError("role", f"a token has the role {role}")
        return _ROLES[role]

    def _image(self, patches: NDArray[np.int64], rows: int) -> bytes:
        """Return the image of these patches, as an uncompressed file."""
        from PIL import Image

        if not len(patches) or len(patches) % rows or (np.diff(patches) != 1).any():
            raise SampleError("cut-image", f"{len(patches)} patches in {rows} rows are not an image")
        first, last = int(patches[0]), int(patches[-1])
        stored = self._set.patch.read(self._pack, first * _PATCH_DIM, (last + 1) * _PATCH_DIM)
        pixels = _pixels(stored.reshape(-1, 3, _PATCH_SIZE, _PATCH_SIZE))
        grid = pixels.reshape(rows, -1, 3, _PATCH_SIZE, _PATCH_SIZE)
        image = grid.transpose(0, 3, 1, 4, 2)  # (rows, pixels of a row, columns, pixels of a column, 3)
        height, width = rows * _PATCH_SIZE, len(patches) // rows * _PATCH_SIZE
        buffer = BytesIO()
        Image.fromarray(image.reshape(height, width, 3)).save(buffer, "BMP")
        return buffer.getvalue()


def _pixels(patches: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert (patches, 3, size, size) normalized floats to pixels."""
    from solo_vlm.models.solo.configuration_solo import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (np.array(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return np.clip(np.rint((patches.astype(np.float32) * std + mean) * 255), 0, 255).astype(np.uint8)


def _exists(url: str) -> bool:
    system, path = file_system(url)
    return system.isfile(path)


_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, arrays, documents
# 1 to 8 are those of fairseq and Megatron; the original SOLO code adds 9 and 10 for patches.
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float64,
    8: np.uint16,
    9: np.float32,
    10: np.float16,
}


class IndexedFile:
    """Numbered one-dimensional arrays, each of which can be read in whole or in part.

    Args:
        index: The `.idx` file, next to the `.bin` file.
        data: The `.bin` file.

    Raises:
        SoloError: Either is broken, or they do not match.
    """

    def __init__(self, index: DataFile, data: DataFile) -> None:
        self._data = data
        self.dtype, self.sizes, self._offsets = _read_index(index)
        ends = self._offsets + self.sizes.astype(np.int64) * self.dtype.itemsize
        if min(self.sizes.min(initial=0), self._offsets.min(initial=0)) < 0:
            raise SoloError(f"{index.url} is damaged: it lists negative sizes or positions")
        if ends.max(initial=0) > data.size:
            raise SoloError(f"{data.url} is truncated: {index.url} lists more than it holds")

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, number: int, start: int = 0, end: int | None = None) -> NDArray[np.generic]:
        """Return elements `start` to `end` of an array; by default all."""
        size = int(self.sizes[number])
        end = size if end is None else end
        if not 0 <= start <= end <= size:
            raise SoloError(f"{self._data.url}: array {number} has {size} elements, not {start} to {end}")
        position = int(self._offsets[number]) + start * self.dtype.itemsize
        return np.frombuffer(_read(self._data, position, (end - start) * self.dtype.itemsize), self.dtype)


@retried
def _read_index(file: DataFile) -> tuple[np.dtype[np.generic], NDArray[np.int32], NDArray[np.int64]]:
    with file.open() as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            raise SoloError(f"{file.url} is not an index of Megatron (of its 'mmap' kind)")
        _, version, kind, arrays, _ = _HEADER.unpack(header)
        if version != 1 or kind not in _DTYPES:
            raise SoloError(f"{file.url} has an unknown version ({version}) or type ({kind})")
        body = stream.read(min(arrays * (4 + 8), file.size))
    if len(body) < arrays * (4 + 8):
        raise SoloError(f"{file.url} is truncated: it should list {arrays} arrays")
    sizes = np.frombuffer(body, np.int32, arrays)
    return np.dtype(_DTYPES[kind]), sizes, np.frombuffer(body, np.int64, arrays, offset=sizes.nbytes)


@retried
def _read(file: DataFile, position: int, count: int) -> bytes:
    return file.read((position, position + count))[0]
