"""The hub: one upload, with errors that a user can act on."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from solo_vlm import __version__
from solo_vlm.utils.errors import SoloError


def check_repo_id(repo_id: str) -> None:
    """Make sure that a name is one that the hub can have.

    Raises:
        SoloError: it is not of the form `owner/name`.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SoloError(f"{repo_id!r} is no name on the hub: {error}") from error
    if "/" not in repo_id:
        raise SoloError(f"{repo_id!r} has no owner: give owner/name")


def upload(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder as a model, in one go; files of the repository that the folder lacks stay.

    Args:
        folder: its whole content is uploaded.
        repo_id: `owner/name`; it is made if it is not there.
        private: of a repository that is made.

    Returns:
        The repository's URL.

    Raises:
        SoloError: no network, no right to write, or the hub refuses the content.
    """
    api = HfApi(library_name="solo-vlm", library_version=__version__)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Upload with solo-vlm {__version__}"
        )
    except OfflineModeIsEnabled as error:
        raise SoloError("the hub is switched off: unset HF_HUB_OFFLINE to upload") from error
    except Exception as error:  # the HTTP and upload libraries below the hub's each have their own
        raise SoloError(f"cannot upload to {api.endpoint}/{repo_id}: {_reason(error)}") from error
    return str(repository.url)


def _reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return (
            "no right to write there; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    return " ".join(str(error).split()) or type(error).__name__
