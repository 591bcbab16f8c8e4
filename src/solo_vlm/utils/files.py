"""Creation of files and folders: the final name appears only when the content is complete and on disk."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, BinaryIO

from solo_vlm.utils.errors import SoloError

LOCK = ".lock"

_PREFIX = ".partial-"

# System errors: the operation that failed, and advice for the user.
_OS_ERRORS = {
    errno.ENOSPC: ("write", "free space there"),
    errno.EDQUOT: ("write", "free space there, or raise the quota"),
    errno.EFBIG: ("write", "raise the limit for the size of files"),
    errno.EROFS: ("write", "make it writable, or choose another place"),
    errno.EACCES: ("access", "change its permissions, or choose another place"),
    errno.EPERM: ("access", "change its permissions, or choose another place"),
    errno.ENOTDIR: ("access", "choose another place"),
    errno.EEXIST: ("access", "choose another place"),
    errno.EISDIR: ("access", "choose another name"),
    errno.EMFILE: ("access", "raise the limit of open files (ulimit -n)"),
    errno.ENAMETOOLONG: ("access", "choose a shorter name"),
    errno.ELOOP: ("access", "remove the loop of links"),
}
# Rust libraries such as safetensors and tokenizers report the number only in the message.
_RUST_ERROR = re.compile(r"os error (\d+)")


def check_new(path: Path) -> None:
    """Raise SoloError unless a folder can be created at `path`; called before long work begins."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SoloError(f"{path} exists already: choose another name or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; rename it to `path` on success, remove it on failure."""
    check_new(path)
    with writing(path):
        partial = _new_partial(path)
        partial.mkdir()
        try:
            yield partial
            for written in partial.rglob("*"):
                sync(written)
            check_new(path)  # another process may have been faster
            if path.exists():
                path.rmdir()
            partial.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name next to `path`; replace `path` on success, remove the file on failure."""
    with writing(path):
        partial = _new_partial(path)
        try:
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise SoloError with the path if the body cannot write, for example to a full or read-only disk."""
    try:
        yield
    except BaseException as error:  # torch's error of a distributed checkpoint is not an Exception
        explained = None if isinstance(error, SoloError) else explain_os_error(error, path)
        if explained is None:
            raise
        raise explained from error


def explain_os_error(error: BaseException, path: Path | None = None) -> SoloError | None:
    """Return a one-line error for an exception caused by a failed read or write; None for other exceptions.

    Args:
        path: Path to which the program wrote. Default: the file that the system names.
    """
    found = next(filter(None, map(_find_os_error, causes(error))), None)
    if found is None:
        return None
    number, name = found
    verb, advice = _OS_ERRORS[number]
    # An inaccessible file may be an input, or one of several outputs. If a copy does not fit, the system
    # names its source.
    is_precise = name and verb == "access" and _PREFIX not in name
    named = name if path is None or is_precise else path
    return SoloError(
        f"cannot {verb} {named or 'the output'}: {os.strerror(number)}; {advice}, then run the same command "
        "again"
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, including those in other processes of a distributed checkpoint."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__]
        waiting += [failure for failure, _ in getattr(one, "failures", {}).values()]


def is_inside(path: str, folder: str) -> bool:
    """Return whether a path, with links resolved, is in a folder or in its blobs in the hub's cache."""
    try:
        real = os.path.realpath(path)
    except ValueError:  # the path contains a zero byte
        return False
    return any(real == root or real.startswith(root.rstrip("/") + "/") for root in _content_roots(folder))


@lru_cache
def _content_roots(folder: str) -> list[str]:
    """Return the folder and, for a path in `models--a--b/snapshots/123`, also `models--a--b/blobs`."""
    root = Path(os.path.realpath(folder))
    snapshots = (parent for parent in root.parents if parent.name == "snapshots")
    blobs = [parent.with_name("blobs") for parent in snapshots]
    return [str(root), *(str(found) for found in blobs if found.is_dir())]


def hash_blocks(content: BinaryIO, size: int, block_size: int, blocks: int) -> str:
    """Hash the size and content of a small file, or the size and evenly spaced blocks of a large one.

    Args:
        content: Open file that can seek.
        size: Size of the file.
        block_size: Bytes per block.
        blocks: Maximum number of blocks.
    """
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    if size <= block_size * blocks:
        digest.update(content.read())
    else:
        for number in range(blocks):
            content.seek((size - block_size) * number // (blocks - 1))
            digest.update(content.read(block_size))
    return digest.hexdigest()


def lock_output_dir(out: Path) -> IO[str] | None:
    """Lock a folder against other runs until the returned file is closed; None if unsupported.

    Raises:
        SoloError: Another process holds the lock, or the folder is not writable.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("w")
    try:
        is_locked = try_lock(file)
    except BlockingIOError as error:
        file.close()
        raise SoloError(f"another run is writing to {out}: wait for it, or choose another folder") from error
    if not is_locked:
        file.close()
        return None
    return file


def try_lock(file: IO[str] | IO[bytes]) -> bool:
    """Lock an open file against other processes until it is closed; return whether that is supported.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader workers
    except BlockingIOError:
        raise
    except OSError:  # file system without locks
        return False
    return True


def process_exists(number: int) -> bool:
    """Return whether a process with this ID is running on this machine."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def remove_partial(folder: Path, name: str = "*") -> None:
    """Remove the temporary files and folders of killed processes; keep those of running ones.

    Args:
        name: Pattern of the final names.
    """
    for path in folder.glob(f"{_PREFIX}[0-9]*-{name}"):
        number = path.name.removeprefix(_PREFIX).partition("-")[0]
        if number.isdecimal() and not process_exists(int(number)):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _new_partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(path.parent, glob.escape(path.name))
    # The suffix stays last, for writers that infer the format from it.
    partial = path.with_name(f"{_PREFIX}{os.getpid()}-{path.name}")
    remove(partial)
    return partial


def _find_os_error(error: BaseException) -> tuple[int, str | None] | None:
    """Return the error number and the file name of a failed write; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        number, name = error.errno, error.filename
    elif match := _RUST_ERROR.search(str(error)):
        number, name = int(match[1]), None
    else:
        return None
    if number not in _OS_ERRORS:
        return None
    return number, os.fsdecode(name) if isinstance(name, str | bytes) else None
