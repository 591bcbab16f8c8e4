"""Download of URL lists by img2dataset, in its own environment.

Its pins of pandas, OpenCV and others conflict with this package's, so it runs as a command.
"""

from __future__ import annotations

import shutil
import subprocess
from codecs import BOM_UTF8
from pathlib import Path

from solo_vlm.data.catalog.entry import DataSet, UrlList
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file

_INSTALL = "python -m venv .venv-img2dataset && .venv-img2dataset/bin/pip install img2dataset"
_LONG_SIDE = 1024  # the processor's default `longest_edge`


def download(data_set: DataSet, urls: Path, out: Path, program: str, processes: int, threads: int) -> None:
    """Download the images of a URL list as WebDataset tars, which the data set's converter reads.

    The program resumes where it stopped, and writes a `*_stats.json` with the failures next to each tar.

    Args:
        data_set: Catalog entry with a `url_list`.
        urls: Published list, or a folder of its files.
        out: Folder for the tars.
        program: Name or path of `img2dataset`.
        processes: Number of processes of the program.
        threads: Number of threads per process.

    Raises:
        SoloError: The set is not a URL list, the list or the program is missing, or the program fails.
    """
    if data_set.url_list is None:
        raise SoloError(f"{data_set.title} is not a list of URLs: fetch it from {data_set.source}")
    if not urls.exists():
        raise SoloError(f"{urls} does not exist: get it from {data_set.source}")
    found = shutil.which(program)
    if found is None:
        raise SoloError(f"{program} is not installed; install it in its own environment: {_INSTALL}")
    if data_set.url_list.format == "tsv":
        urls = _with_header(data_set.url_list, urls, out)
    command = download_command(data_set.url_list, urls, out, found, processes, threads)
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise SoloError(f"{program} ended with exit code {error.returncode}") from error


def download_command(
    url_list: UrlList, urls: Path, out: Path, program: str, processes: int, threads: int
) -> list[str]:
    """Return the command, which keeps the bytes of images within the size limit and shrinks larger ones."""
    settings = {
        "url_list": urls,
        "input_format": url_list.format,
        "url_col": url_list.url_column,
        "caption_col": url_list.caption_column,
        "output_folder": out,
        "output_format": "webdataset",
        "image_size": _LONG_SIDE,
        "resize_mode": "keep_ratio_largest",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "processes_count": processes,
        "thread_count": threads,
    }
    return [program, *(f"--{name}={value}" for name, value in settings.items())]


def _with_header(url_list: UrlList, urls: Path, out: Path) -> Path:
    """Write a copy of the published table with the header that the program needs, next to the tars."""
    headed = out.with_name(f"{out.name}-urls.tsv")
    with urls.open("rb") as source, new_file(headed) as partial, partial.open("wb") as target:
        target.write(f"{url_list.caption_column}\t{url_list.url_column}\n".encode())
        target.write(source.read(len(BOM_UTF8)).removeprefix(BOM_UTF8))
        shutil.copyfileobj(source, target)
    return headed
