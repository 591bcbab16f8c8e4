"""Environment of a measurement."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from solo_vlm.utils.files import write_text


def environment() -> dict[str, object]:
    """Return processor, cores, system and versions, as plain values."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "numpy", "pillow")},
    }


def publish(results: dict[str, Any], as_json: bool, out: Path | None) -> None:
    """Print results as one JSON object if asked, and write them to a file if there is one."""
    if as_json:
        print(json.dumps(results))
    if out:
        write_text(out, json.dumps(results, indent=2) + "\n")


def _processor() -> str:
    """Return the name of the processor, if the system provides it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
