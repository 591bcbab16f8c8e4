"""Download by img2dataset: its arguments, and errors when it cannot run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from solo_vlm.data.catalog.download import download
from solo_vlm.data.catalog.entry import get
from solo_vlm.utils.errors import SoloError


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Return a fake img2dataset that records its arguments, and fails for a list named "fail"."""
    path = tmp_path / "img2dataset"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "arguments = dict(a.removeprefix('--').split('=', 1) for a in sys.argv[1:])\n"
        "if 'fail' in arguments['url_list']: sys.exit(3)\n"
        "pathlib.Path(arguments['output_folder'] + '.json').write_text(json.dumps(arguments))\n"
    )
    path.chmod(0o755)
    return path


def recorded_arguments(tmp_path: Path) -> dict[str, str]:
    return json.loads((tmp_path / "tars.json").read_text())


def test_parquet_lists_are_passed_unchanged(tmp_path, program):
    (tmp_path / "lists").mkdir()
    download(get("capfusion"), tmp_path / "lists", tmp_path / "tars", str(program), 4, 32)
    assert recorded_arguments(tmp_path) == {
        "url_list": str(tmp_path / "lists"),
        "input_format": "parquet",
        "url_col": "image_url",
        "caption_col": "capsfusion",
        "output_folder": str(tmp_path / "tars"),
        "output_format": "webdataset",
        "image_size": "1024",
        "resize_mode": "keep_ratio_largest",
        "resize_only_if_bigger": "True",
        "skip_reencode": "True",
        "processes_count": "4",
        "thread_count": "32",
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_table_without_header_gets_one(tmp_path, program, encoding):
    table = tmp_path / "Train_GCC-training.tsv"
    table.write_text("a bus\thttps://x/1.jpg\n", encoding=encoding)
    download(get("cc3m"), table, tmp_path / "tars", str(program), 1, 1)
    assert (
        Path(recorded_arguments(tmp_path)["url_list"]).read_text() == "caption\turl\na bus\thttps://x/1.jpg\n"
    )
    assert (recorded_arguments(tmp_path)["url_col"], recorded_arguments(tmp_path)["caption_col"]) == (
        "url",
        "caption",
    )
    assert table.read_text(encoding=encoding) == "a bus\thttps://x/1.jpg\n"


def test_download_errors_are_reported(tmp_path, program):
    urls = tmp_path / "fail.parquet"
    urls.write_bytes(b"")
    with pytest.raises(SoloError, match="VQAv2 is not a list of URLs"):
        download(get("vqav2"), urls, tmp_path / "tars", str(program), 1, 1)
    with pytest.raises(SoloError, match="get it from BAAI/CapsFusion-120M"):
        download(get("capfusion"), tmp_path / "nothing", tmp_path / "tars", str(program), 1, 1)
    with pytest.raises(SoloError, match="is not installed; install it in its own environment"):
        download(get("capfusion"), urls, tmp_path / "tars", str(tmp_path / "none"), 1, 1)
    with pytest.raises(SoloError, match="exit code 3"):
        download(get("capfusion"), urls, tmp_path / "tars", str(program), 1, 1)
