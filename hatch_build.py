"""Build hook: compile `enlarge.c` where possible; elsewhere slower libraries compute the same."""

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
    """Hook that compiles `enlarge.so` next to its source and adds it to the wheel, now platform-specific."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = Path(self.root) / SOURCE
        library = source.with_suffix(".so")
        if not compiled(source, library):
            return
        build_data["artifacts"].append(f"/{SOURCE.with_suffix('.so')}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compiled(source: Path, library: Path) -> bool:
    """Compile atomically, after removing any old library; return whether it succeeded."""
    library.unlink(missing_ok=True)
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform == "win32":
        return False
    partial = library.with_suffix(f".{os.getpid()}")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = ["-O3", "-ffp-contract=off", "-shared", "-fPIC"]  # round interpolation weights like OpenCV
    command = [*compiler, *flags, "-o", str(partial), str(source), "-lm"]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{source.name} was not compiled; images are encoded more slowly ({error})", file=sys.stderr)
        return False
    partial.replace(library)
    return True
