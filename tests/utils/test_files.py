"""Atomic files and folders, remains after a kill, locks, and errors of the system."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import (
    explain_os_error,
    lock_output_dir,
    new_file,
    new_folder,
    remove_partial,
    writing,
)
from solo_vlm.utils.json_lines import LinesFile

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from solo_vlm.utils.files import new_folder
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "weights").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""
HOLDER = """
import sys
from pathlib import Path
from solo_vlm.utils.files import lock_output_dir
from solo_vlm.utils.json_lines import LinesFile
held = lock_output_dir(Path(sys.argv[1])), LinesFile(Path(sys.argv[1]) / "answers.jsonl")
print("held", flush=True)
sys.stdin.read()
"""


def test_remains_of_a_killed_process_are_removed_when_the_name_is_written_again(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, tmp_path / "model"])
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".partial-")
    with new_folder(tmp_path / "model") as partial:
        assert list(tmp_path.iterdir()) == [partial]
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(SoloError, match="exists already"), new_folder(tmp_path / "model"):
        (tmp_path / "model" / "other").mkdir(parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_remains_of_running_processes_and_other_names_stay(tmp_path):
    kept = [
        tmp_path / f".partial-{os.getppid()}-a",
        tmp_path / ".partial-step-00000001",
        tmp_path / "partial-a",
    ]
    for path in kept:
        path.write_text("")
    remove_partial(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("name", ["[x]*.json", "a b.json"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, name):
    (tmp_path / name).write_text("old")
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / name) as partial:
        partial.write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / name).read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_second_process_is_locked_out_until_the_first_has_ended(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SoloError, match="another run is writing to"):
            lock_output_dir(tmp_path)
        with pytest.raises(SoloError, match=r"another process is writing to .*answers\.jsonl"):
            LinesFile(tmp_path / "answers.jsonl")
        other.kill()
    lock_output_dir(tmp_path).close()
    with LinesFile(tmp_path / "answers.jsonl") as file:
        file.append([{"a": 1}])


class LibraryError(Exception):
    """Error of a library written in Rust."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "x"), "cannot write /a/out: No space left on device; free space there"),
        (OSError(errno.EDQUOT, "x"), "cannot write /a/out: Disk quota exceeded; free space there, or raise"),
        (OSError(errno.EROFS, "x"), "cannot write /a/out: Read-only file system; make it writable"),
        (OSError(errno.EACCES, "x", "/a/out"), "cannot access /a/out: Permission denied; change its perm"),
        (
            OSError(errno.EACCES, "x", "/b/input"),
            "cannot access /b/input: Permission denied; change its perm",
        ),
        (
            LibraryError("I/O error: No space left on device (os error 28)"),
            "cannot write /a/out: No space left",
        ),
    ],
)
def test_system_errors_are_one_line(tmp_path, error, message):
    out = type(tmp_path)("/a/out")
    with pytest.raises(SoloError, match="^" + message), writing(out):
        raise error
    with pytest.raises(SoloError, match="^" + message), writing(out):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("the writer failed") from cause


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), ValueError("os error"), KeyboardInterrupt()])
def test_other_errors_pass(tmp_path, error):
    assert explain_os_error(error) is None
    with pytest.raises(type(error)), writing(tmp_path):
        raise error
