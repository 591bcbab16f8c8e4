"""Data sets of the Hugging Face Hub: their names, the commit that is read, and the files of a split."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from solo_vlm.data.sources.files import DataFile, Limits, find_files
from solo_vlm.data.sources.retries import bound_waits_for_hub, retried_at_start
from solo_vlm.utils.errors import SoloError, did_you_mean, first_line

_PREFIX = "hf://datasets/"
# The revision ends at the next slash, as in paths of HfFileSystem, except in the hub's own references.
_PATH = re.compile(
    r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+)"
    r"(?:@(?P<revision>refs/(?:convert/\w+|pr/\d+)|[^/:]+))?"
    r"(?::(?P<config>[^/]*)(?:/(?P<split>[^/]+))?|/(?P<path>.*))?"
)
_SHOWN = 12  # names listed in a message


@dataclass(frozen=True)
class HubPath:
    """Place in a data set of the hub: files by path, or a split of a configuration.

    Attributes:
        repo: Owner and name.
        revision: Branch, tag or commit; "" is the default branch.
        path: File, folder or glob pattern; "" for a split.
        config: Configuration; "" is the default one.
        split: Split; "" is the only one, or "train".
    """

    repo: str
    revision: str = ""
    path: str = ""
    config: str = ""
    split: str = ""

    @classmethod
    def parse(cls, url: str) -> HubPath | None:
        """Return the parts of a URL; None if it names no data set of the hub.

        Raises:
            SoloError: The URL is incomplete.
        """
        if not url.startswith(_PREFIX):
            return None
        if (match := _PATH.fullmatch(url)) is None:
            raise SoloError(
                f"{url}: expected hf://datasets/OWNER/NAME, with @REVISION and /PATH or :CONFIG/SPLIT, if any"
            )
        parts = {name: value or "" for name, value in match.groupdict().items()}
        return cls(**parts | {"revision": unquote(parts["revision"])})

    @property
    def url(self) -> str:
        """URL of the place."""
        return str(self)

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        config, split = self.config, f"/{self.split}" if self.split else ""
        place = f"/{self.path}" if self.path else f":{config}{split}" if config or split else ""
        return f"{_PREFIX}{self.repo}{revision}{place}"


def pin(url: str) -> str:
    """Return a URL with the commit that its revision stands for now; URLs of other places as they are.

    Raises:
        SoloError: There is no such data set or revision, or no access to it, or the hub is not to be asked.
    """
    place = HubPath.parse(url)
    if place is None:
        return url
    if constants.HF_HUB_OFFLINE:
        raise SoloError(f"cannot read {url}: HF_HUB_OFFLINE is set; unset it, or name local files")
    bound_waits_for_hub()
    return str(replace(place, revision=_commit(place)))


def without_revision(url: str) -> str:
    """Return a URL of the hub without its revision; URLs of other places as they are."""
    place = HubPath.parse(url)
    return url if place is None else str(replace(place, revision=""))


@retried_at_start
def _commit(place: HubPath) -> str:
    api = huggingface_hub.HfApi()
    try:
        info = api.dataset_info(place.repo, revision=place.revision or None, expand=["sha"])
        api.auth_check(place.repo, repo_type="dataset")  # a gated data set has public facts, but no files
    except GatedRepoError as error:
        raise SoloError(
            f"{place.repo} is gated: accept its terms at {api.endpoint}/datasets/{place.repo}, and set "
            "HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise SoloError(
            f"no data set {place.repo} on {api.endpoint}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        refs = api.list_repo_refs(place.repo, repo_type="dataset")
        known = _listed([ref.name for ref in (*refs.branches, *refs.tags)])
        raise SoloError(f"{place.repo} has no revision {place.revision}: it has {known}") from error
    return str(info.sha)


def split_files(place: HubPath, limits: Limits) -> list[DataFile]:
    """Return the files of a split at a commit, as `datasets` resolves it.

    Raises:
        SoloError: There is no such configuration or split.
    """
    try:
        found = _data_files(place)
    except ValueError as error:
        configs = _configs(place)
        if place.config in configs:
            raise
        what = (
            f"no configuration {place.config}" if place.config else "several configurations, none the default"
        )
        hint = did_you_mean(place.config, configs)
        raise SoloError(f"{place.repo} has {what}: it has {_listed(configs)}{hint}") from error
    split = place.split or ("train" if len(found) > 1 else next(iter(found), ""))
    if split not in found:
        where = f"{place.repo}:{place.config}" if place.config else place.repo
        raise SoloError(f"{where} has no split {split}: it has {_listed(list(found))}")
    files = [file for url in found[split] for file in find_files(url, (), limits)]
    root = str(replace(place, config="", split=""))
    return [replace(file, root=root) for file in files]


@retried_at_start
def _data_files(place: HubPath) -> dict[str, list[str]]:
    """Return the URLs of the files of each split."""
    try:
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise SoloError(
            f"{place}: configurations and splits need `pip install datasets`; without it, name files: "
            f"{_PREFIX}{place.repo}/**/*.parquet"
        ) from error
    try:
        builder = load_dataset_builder(place.repo, place.config or None, revision=place.revision)
    except (DatasetNotFoundError, RuntimeError) as error:  # no data files; a script
        raise SoloError(
            f"{place.repo}: {first_line(error)}; name its files as {_PREFIX}OWNER/NAME/PATH"
        ) from error
    return {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}


def _configs(place: HubPath) -> list[str]:
    from datasets import get_dataset_config_names

    return list(get_dataset_config_names(place.repo, revision=place.revision))


@retried_at_start
def what_exists(url: str) -> str:
    """Return the end of a message that lists the top of a data set; empty for URLs of other places."""
    place = HubPath.parse(url)
    if place is None:
        return ""
    api = huggingface_hub.HfApi()
    tree = api.list_repo_tree(place.repo, revision=place.revision, repo_type="dataset")
    return f": {place.repo} has {_listed(sorted(entry.path for entry in tree))}"


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
