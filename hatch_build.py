"""Compiles the C of the package where that can be done; elsewhere slower libraries do the same."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/solo_vlm/models/solo/enlarge.c")


class CompiledKernel(BuildHookInterface):
    """Puts `enlarge.so` beside its source, and into the wheel, which then is one of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = Path(self.root) / SOURCE
        library = source.with_suffix(".so")
        if not compiled(source, library):
            return
        build_data["artifacts"].append(f"/{SOURCE.with_suffix('.so')}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compiled(source: Path, library: Path) -> bool:
    """Whether there is a new library; never half of one, and no old one."""
    library.unlink(missing_ok=True)
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform == "win32":
        return False
    partial = library.with_suffix(f".{os.getpid()}")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = ["-O3", "-ffp-contract=off", "-shared", "-fPIC"]  # weights must round as OpenCV's do
    command = [*compiler, *flags, "-o", str(partial), str(source), "-lm"]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{source.name} is not compiled: images are read somewhat slower ({error})", file=sys.stderr)
        return False
    partial.replace(library)
    return True
