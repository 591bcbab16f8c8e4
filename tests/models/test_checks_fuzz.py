"""Any safetensors header and any config.json loads, or is rejected with a message."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.factories import make_solo

from solo_vlm.models.load import load_config, load_model, load_processor
from solo_vlm.utils.errors import SoloError

pytestmark = pytest.mark.fuzz

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 48, 2**16, 2**31, 2**63, 10**12, 10**30, 0.5, 1e308])
STRINGS = st.sampled_from(["", "x", "gelu", "F32", "I8", "../x", "llama", "solo", "float16", "__metadata__"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    make_solo("qwen3").save(folder)
    return folder


@pytest.fixture(scope="module")
def copy(model, tmp_path_factory):
    return Path(shutil.copytree(model, tmp_path_factory.mktemp("fuzz") / "copy"))


def load(folder):
    for loader in (load_config, load_model, load_processor):
        try:
            loader(folder)
        except SoloError as error:
            assert str(error) and "\n" not in str(error)


@st.composite
def changed(draw, value):
    """Draw a JSON value with a few of its members changed, removed or added."""
    if isinstance(value, dict) and value:
        value = dict(value)
        for key in draw(st.lists(st.sampled_from(sorted(value)), max_size=2, unique=True)):
            if draw(st.booleans()):
                value[key] = draw(changed(value[key]) if draw(st.booleans()) else ANYTHING)
            else:
                value.pop(key, None)
        return value
    return draw(ANYTHING)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_config(model, copy, data):
    config = json.loads((model / "config.json").read_text())
    part = data.draw(st.sampled_from(["all", "text_config"]))
    if part == "all":
        config = data.draw(changed(config))
    else:
        config["text_config"] = data.draw(changed(config["text_config"]))
    (copy / "config.json").write_text(json.dumps(config))
    try:
        load(copy)
    finally:
        shutil.copy(model / "config.json", copy)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_header(model, copy, data):
    content = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    encoded = json.dumps(data.draw(changed(header))).encode()
    stated = data.draw(
        st.just(len(encoded)) | st.sampled_from([0, 1, len(encoded) + 9, 2**25, 2**40, 2**64 - 1])
    )
    tensors = content[8 + length :]
    kept = data.draw(st.just(len(tensors)) | st.integers(0, len(tensors)))
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", stated) + encoded + tensors[:kept])
    try:
        load(copy)
    finally:
        shutil.copy(model / "model.safetensors", copy)
