"""Atomic creation of files and folders: the final name appears only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from solo_vlm.utils.errors import SoloError

_PREFIX = ".partial-"


def check_new(path: Path) -> None:
    """Raise SoloError unless a folder can be created at `path`; called before long work begins."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SoloError(f"{path} exists already: choose another name or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; rename it to `path` on success, remove it on failure."""
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name next to `path`; replace `path` on success, remove the file on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_partial(folder: Path) -> None:
    """Remove temporary files and folders left by killed processes."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def _partial(path: Path) -> Path:
    # The suffix stays last, for writers that infer the format from it.
    return path.with_name(f"{_PREFIX}{os.getpid()}-{path.name}")
