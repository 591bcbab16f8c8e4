from __future__ import annotations

import pytest

from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve.page.limits import Limits
from solo_vlm.serve.page.service import Service


@pytest.fixture
def make_service(solo):
    """A service of the small model, with other limits than usual."""

    def make(**limits) -> Service:
        return Service(GenerationPipeline(solo.model, solo.processor), "small", Limits(**limits))

    return make
