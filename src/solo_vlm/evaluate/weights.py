"""The identity of a model: a hash of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from solo_vlm.utils.errors import SoloError


def weights_hash(model: str | Path) -> str:
    """SHA-256 over the files with a model's weights, in order of their names.

    Args:
        model: folder, or hub id of a model that has been downloaded.

    Raises:
        SoloError: there are no weights.
    """
    folder = Path(model) if Path(model).is_dir() else _downloaded(str(model))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise SoloError(f"{model} has no weights (.safetensors)")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise SoloError(f"{hub_id} is neither a folder nor a model that has been downloaded") from error
