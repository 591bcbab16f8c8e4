from __future__ import annotations

import pytest
from tests.factories import ProcessGroup, image_rows, make_solo, text_rows, write_training_data


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Return a folder with training data (colors, texts of several lengths) and models of three families."""
    folder = tmp_path_factory.mktemp("runs")
    write_training_data(folder, image_rows(24), text_rows(64))
    for family in ("llama", "mistral", "qwen3"):
        make_solo(family).save(folder / family)
    return folder


@pytest.fixture
def start():
    """Return a function that starts a group of processes, killed after the test if still running."""
    groups = []

    def start(size, target, *arguments):
        groups.append(ProcessGroup(size, target, *arguments))
        return groups[-1]

    yield start
    for group in groups:
        group.kill()
