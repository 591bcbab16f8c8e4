from __future__ import annotations

import pytest

from small_run import Group, images, texts, write_data
from tiny import make_solo


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Colours to name, texts of several lengths, and models of three families to train."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder, images(24), texts(64))
    for family in ("llama", "mistral", "qwen3"):
        make_solo(family).save(folder / family)
    return folder


@pytest.fixture
def start():
    """Starts a group of processes; what still runs at the end of the test is killed."""
    groups = []

    def start(size, target, *arguments):
        groups.append(Group(size, target, *arguments))
        return groups[-1]

    yield start
    for group in groups:
        group.kill()
