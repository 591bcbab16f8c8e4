"""Speed, memory and disk usage of the data path from images to packed sequences.

    python benchmarks/data_path.py [--images FOLDER] [--json]

On one core, in images per second of processor time, which other programs on the machine hardly affect: the
decoder alone; the whole path (decode, resize, cut into uint8 patches); the same path without the compiled
library (OpenCV resizes and splits, on one thread or on its default threads); Pillow and NumPy alone; and the
steps of the original code (from base64 by Pillow to normalized float32 patches by torch). Also photographs
four times as wide and high, which shrink. Then, in wall-clock time, the loader with 0, 1 and 2 workers of one
or two threads: parquet to packed sequences of 32,768 tokens. Then the loader's memory as the data grows, and
a stream of eight sources of photographs, each with its own packer: the memory of the documents that wait, as
they are, compressed, and decoded; the size of its state; and what a resume encodes. Last, how long a run with
ten thousand files takes to open them in process 0, to share them, and to receive them in another process.

The variants alternate, in the first part every ten images, and each result is the median of the turns.
Without `--images`, photographs of about 500 x 375 are cut from the two in scikit-learn.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from environment import environment
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from solo_vlm import SoloImageProcessor
from solo_vlm.data.encode import Document, Draft, Encoder
from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.sample import Sample
from solo_vlm.data.sources import open_source
from solo_vlm.data.sources.parquet import SCHEMA, write_samples
from solo_vlm.data.sources.sharing import pack_sources, unpack_sources
from solo_vlm.data.streams import MixtureItem, VirtualStream
from solo_vlm.models.from_llm import compose
from solo_vlm.models.solo.image_loading_solo import load_pixels
from solo_vlm.models.solo.image_processing_solo import LIBRARY, image_to_patches, resize
from solo_vlm.quickstart.llm import train_tokenizer

TURN = 10  # images: short, so that disturbances affect all variants alike
STREAMS = 4
LAYOUTS = ((0, 1), (1, 1), (2, 1), (0, 2), (1, 2))  # workers, threads
GROUPS = 5 * STREAMS  # row groups of the smallest data: one more than the streams keep open
ROW_GROUP = 256
CAPTION = "a photograph, as one would find it on the web, with a caption of some twenty words"


def photographs(count: int, rng: np.random.Generator, quality: int) -> Iterator[bytes]:
    """Yield JPEGs of about 500 x 375 pixels."""
    from sklearn.datasets import load_sample_images

    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427
    for index in range(count):
        original = originals[index % len(originals)]
        width = int(rng.integers(460, 541))
        height = round(width * 0.75)
        left, top = rng.integers(0, original.width - width), rng.integers(0, original.height - height)
        yield jpeg(original.crop((left, top, left + width, top + height)), quality)


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def read_photographs(folder: Path, count: int) -> Iterator[bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg"))
    return (path.read_bytes() for path in islice(files, count))


# --- one core ------------------------------------------------------------------------------------------


def decode_by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def path_by_pillow(data: bytes, processor: SoloImageProcessor) -> np.ndarray:
    """Decode, resize and cut without OpenCV or torch; return (num_patches, 3072) uint8."""
    image = Image.open(BytesIO(data)).convert("RGB")
    rows, columns = processor.get_patch_grid(image.height, image.width)
    resized = np.asarray(image.resize((columns * 32, rows * 32), Image.Resampling.BILINEAR))
    patches = resized.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3)
    return patches.reshape(rows * columns, -1)


def path_by_opencv(data: bytes, processor: SoloImageProcessor) -> np.ndarray:
    """Run the whole path without the compiled library."""
    pixels = load_pixels(data)
    rows, columns = processor.get_patch_grid(*pixels.shape[:2])
    return image_to_patches(resize(pixels, rows * 32, columns * 32), 32)


def path_by_original(url: str, processor: SoloImageProcessor) -> torch.Tensor:
    """Run the original code's steps on a data URL; return normalized (num_patches, 3072) float32."""
    image = Image.open(BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")
    rows, columns = processor.get_patch_grid(image.height, image.width)
    resized = image.resize((columns * 32, rows * 32), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()  # (3, height, width)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std)
    )
    normalized = pixels.float().div(255).clone().sub_(mean).div_(std)
    patches = normalized.unfold(1, 32, 32).unfold(2, 32, 32)  # (3, rows, columns, 32, 32)
    return patches.permute(1, 2, 0, 3, 4).contiguous().view(rows * columns, -1)


def one_core(images: Sequence[bytes], rounds: int, quality: int) -> dict[str, float]:
    """Return images per second of processor time, and their ratios within a turn."""
    processor = SoloImageProcessor()
    as_url = {data: f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in images}
    variants: dict[str, Callable[[bytes], Any]] = {
        "decode_only": decode_by_pillow,
        "own_decode_only": load_pixels,
        "whole": processor.encode_image,
        "opencv": lambda data: path_by_opencv(data, processor),
        "opencv_threads": lambda data: path_by_opencv(data, processor),
        "pillow": lambda data: path_by_pillow(data, processor),
        "release": lambda data: path_by_original(as_url[data], processor),
    }
    taken = take_turns(variants, images, rounds)
    large = [enlarged(data, 4, quality) for data in images[:TURN]]
    taken_large = take_turns({name: variants[name] for name in ("whole", "pillow")}, large, rounds)

    pairs = [(processor.encode_image(data)[0], path_by_pillow(data, processor)) for data in images]
    differences = [np.abs(whole.astype(np.int16) - pillow) for whole, pillow in pairs]
    rates = {f"{name}_images_per_second": 1 / statistics.median(each) for name, each in taken.items()}
    return {
        "images_per_second": rates.pop("whole_images_per_second"),
        **rates,
        **{f"whole_over_{name}": ratio(taken, name) for name in taken if name != "whole"},
        "large_images_per_second": 1 / statistics.median(taken_large["whole"]),
        "large_whole_over_pillow": ratio(taken_large, "pillow"),
        "mean_levels_from_pillow": statistics.mean(float(levels.mean()) for levels in differences),
        "most_levels_from_pillow": max(int(levels.max()) for levels in differences),
    }


def take_turns(
    variants: dict[str, Callable[[bytes], Any]], images: Sequence[bytes], rounds: int
) -> dict[str, list[float]]:
    """Return seconds of processor time per image, by turn."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for start in [*range(0, len(images), TURN)] * rounds:
        batch = images[start : start + TURN]
        for name, run in variants.items():
            cv2.setNumThreads((os.cpu_count() or 1) if name == "opencv_threads" else 1)
            started = time.process_time()
            for data in batch:
                run(data)
            taken[name].append((time.process_time() - started) / len(batch))
    cv2.setNumThreads(1)
    return taken


def ratio(taken: dict[str, list[float]], name: str) -> float:
    """Return the speedup of the whole path over a variant."""
    return statistics.median(other / whole for other, whole in zip(taken[name], taken["whole"], strict=True))


def enlarged(data: bytes, times: int, quality: int) -> bytes:
    image = Image.open(BytesIO(data))
    return jpeg(image.resize((image.width * times, image.height * times)), quality)


# --- several cores -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamMaker:
    """Factory of the streams of one parquet file, for any process."""

    path: Path
    encoder: Encoder
    length: int

    def __call__(self, index: int) -> VirtualStream:
        mixture = [MixtureItem(open_source(str(self.path)))]
        return VirtualStream(index, STREAMS, mixture, self.encoder.draft, self.length)


def make_encoder() -> Encoder:
    """Make an encoder with the processor of a tiny model."""
    logging.set_verbosity_error()  # hides notes on the initialization of new embeddings
    tokenizer = train_tokenizer([CAPTION], vocab_size=300)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    return Encoder(compose(llm, tokenizer).processor)


def packed(
    path: Path, encoder: Encoder, length: int, workers: int, threads: int = 1
) -> Generator[dict[str, Any]]:
    make_stream = StreamMaker(path, encoder, length)
    yield from PackedLoader(make_stream, STREAMS, length, pad_token_id=0, workers=workers, threads=threads)


def loader_rates(path: Path, length: int, sequences: int, rounds: int) -> dict[tuple[int, int], float]:
    """Return images per second of wall-clock time by workers and threads, after the first sequences."""
    rates: dict[tuple[int, int], list[float]] = {layout: [] for layout in LAYOUTS}
    encoder = make_encoder()
    for _ in range(rounds):
        for layout, measured in rates.items():
            batches = packed(path, encoder, length, *layout)
            for _ in range(STREAMS):
                next(batches)
            started = time.perf_counter()
            images = sum(len(batch["image_grid_thw"]) for batch in islice(batches, sequences))
            measured.append(images / (time.perf_counter() - started))
            batches.close()  # ends the workers
    return {layout: statistics.median(measured) for layout, measured in rates.items()}


def loader_memory(folder: Path, growth: Sequence[int], sequences: int) -> dict[str, float]:
    """Return resident megabytes of the loader and two workers, in a new process per size of the data."""
    samples = [sample(jpeg(Image.effect_noise((32, 32), 50), quality=95)) for _ in range(ROW_GROUP)]
    memory = {}
    for times in growth:
        path = folder / f"{times}x.parquet"
        write_row_groups(path, samples, GROUPS * times)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            memory[str(times * GROUPS * ROW_GROUP)] = fresh.submit(
                resident_megabytes, path, sequences
            ).result()
        path.unlink()
    return memory


def resident_megabytes(path: Path, sequences: int) -> float:
    """Return resident megabytes of this process and its children after packed sequences of 4,096 tokens."""
    batches = packed(path, make_encoder(), 4096, workers=2)
    for _ in range(sequences):
        next(batches)
    this = psutil.Process()
    return sum(process.memory_info().rss for process in (this, *this.children())) / 1e6


# --- packers -------------------------------------------------------------------------------------------


def packers(path: Path, length: int) -> dict[str, float]:
    """Return memory, state and resume of a stream of eight sources with a packer each."""
    encoder, calls = make_encoder(), Counter[str]()

    def make_stream() -> VirtualStream:
        mixture = [MixtureItem(open_source(str(path))) for _ in range(8)]
        return VirtualStream(0, STREAMS, mixture, encode, length, weight_by="sequences")

    def encode(row: Sample) -> Draft:
        calls["encoded"] += 1
        return encoder.draft(row)

    stream = make_stream()
    packs = iter(stream)
    state = [next(packs).state for _ in range(16)][-1]
    held = [item for group in stream._groups for part in group.parts() for item in part]
    drafts = [item.content.draft for item in held]
    compressed = sum(map(nbytes, drafts))
    decoded = sum(nbytes(draft.decode()) for draft in drafts)
    calls.clear()
    again = make_stream()
    again.load_state_dict(state)
    on_resume = calls["encoded"]
    if next(iter(again)).keys != next(packs).keys:
        raise AssertionError("the resumed stream differs")
    return {
        "documents": len(held),
        "megabytes": compressed / 1e6,
        "decoded_megabytes": decoded / 1e6,
        "decoded_over_compressed": decoded / compressed,
        "state_bytes": len(json.dumps(state)),
        "state_bytes_per_document": len(json.dumps(state)) / len(held),
        "encoded_on_resume": on_resume,
    }


def nbytes(held: Draft | Document) -> int:
    """Return the bytes of a document's arrays and compressed images."""
    arrays = [value for value in vars(held).values() if isinstance(value, np.ndarray)]
    images = held.images if isinstance(held, Draft) else ()
    return sum(array.nbytes for array in arrays) + sum(len(image) for image, _ in images)


# --- many shards ---------------------------------------------------------------------------------------


def many_shards(folder: Path, count: int) -> dict[str, float]:
    """Return seconds to open small parquet files, to pack them for other processes, and to unpack them."""
    source = folder / "shards"
    source.mkdir()
    write_samples(source / "0.parquet", [sample(b"")])
    for number in range(1, count):
        shutil.copy(source / "0.parquet", source / f"{number}.parquet")
    started = time.perf_counter()
    sources = [open_source(source, format="auto")]
    opened = time.perf_counter()
    packed = pack_sources(sources, str(folder))
    shared = time.perf_counter()
    unpack_sources(packed, str(folder), 0, 8)
    received = time.perf_counter()
    return {
        "shards": len(sources[0]),
        "open_seconds": opened - started,
        "share_seconds": shared - opened,
        "receive_seconds": received - shared,
        "megabytes": len(packed) / 1e6,
    }


# --- disk ----------------------------------------------------------------------------------------------


def sample(image: bytes) -> dict[str, Any]:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": CAPTION}]
    return {
        "id": None,
        "messages": [{"role": "assistant", "content": parts}],
        "images": [{"bytes": image, "path": None}],
    }


def write_row_groups(path: Path, samples: Sequence[dict[str, Any]], count: int) -> None:
    """Write `count` row groups, each with the same samples."""
    group = pa.Table.from_pylist(list(samples), SCHEMA)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for _ in range(count):
            writer.write_table(group)


def disk(folder: Path, images: Sequence[bytes]) -> float:
    """Return the size of a parquet file divided by that of its JPEGs."""
    path = folder / "written.parquet"
    write_samples(path, map(sample, images))
    return path.stat().st_size / sum(map(len, images))


def measure(images: Sequence[bytes], arguments: argparse.Namespace) -> dict[str, Any]:
    rounds, sequences = arguments.rounds, arguments.sequences
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "photographs.parquet"
        write_row_groups(file, [sample(image) for image in images[:ROW_GROUP]], GROUPS)
        one = one_core(images, rounds, arguments.quality)
        rates = loader_rates(file, arguments.length, sequences, rounds)
        return {
            **one,
            "loader_images_per_second": {
                str(w): rate for (w, threads), rate in rates.items() if threads == 1
            },
            "loader_2_threads_images_per_second": {str(w): rate for (w, n), rate in rates.items() if n == 2},
            "loader_memory_mb": loader_memory(folder, arguments.growth, sequences),
            "packers_of_eight_sources": packers(file, arguments.length),
            "many_shards": many_shards(folder, arguments.shards),
            "bytes_on_disk_over_jpeg": disk(folder, images),
            "photographs": len(images),
            "mean_jpeg_bytes": statistics.mean(map(len, images)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder of JPEGs to use, searched recursively"
    )
    parser.add_argument("--photographs", type=int, default=200, help="maximum number of photographs (200)")
    parser.add_argument(
        "--quality",
        type=int,
        default=95,
        help="quality of synthetic JPEGs (95, as in cameras and ImageNet)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="number of measurements (9)")
    parser.add_argument("--sequences", type=int, default=16, help="packed sequences per loader (16)")
    parser.add_argument("--length", type=int, default=32_768, help="tokens per packed sequence (32768)")
    parser.add_argument(
        "--growth", type=int, nargs="+", default=[1, 10, 100], help="relative sizes of the data (1 10 100)"
    )
    parser.add_argument("--shards", type=int, default=10_000, help="number of small files (10000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    if arguments.images:
        images = list(read_photographs(arguments.images, arguments.photographs))
    else:
        images = list(photographs(arguments.photographs, rng, arguments.quality))
    if not images:
        parser.error(f"no .jpg files in {arguments.images}")
    results = measure(images, arguments)
    if arguments.json:
        versions = {
            "opencv": cv2.__version__,
            "simplejpeg": simplejpeg.__version__,
            "compiled": LIBRARY.exists(),
        }
        print(json.dumps({**results, "environment": {**environment(), **versions}}))
        return
    for name, value in results.items():
        print(f"{name:36}", value if isinstance(value, dict) else f"{value:,.3f}")


if __name__ == "__main__":
    main()
