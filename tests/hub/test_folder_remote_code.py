"""A published folder loads with transformers alone and gives the same answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.factories import ask, make_llm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import solo_vlm
from solo_vlm.generate import GenerationPipeline
from solo_vlm.hub.folder import code_files, write_folder
from solo_vlm.models.from_llm import ImageDesign, compose
from solo_vlm.models.load import load_model, load_processor

# Runs without solo_vlm, OpenCV and simplejpeg, which users of transformers may lack; `-I -S` also keeps out
# the path of an editable installation. The card's own example comes first.
ELSEWHERE = """
import json, sys
folder, site, source, out = sys.argv[1:]
sys.path.append(site)
sys.modules["solo_vlm"] = sys.modules["cv2"] = sys.modules["simplejpeg"] = None
try:
    import solo_vlm
    sys.exit("solo_vlm is here")
except ImportError:
    pass

EXAMPLE

import numpy as np
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
remote = {"trust_remote_code": True}
loaded = [
    model,
    processor,
    AutoConfig.from_pretrained(folder, **remote),
    AutoImageProcessor.from_pretrained(folder, **remote),
    AutoModel.from_pretrained(folder, **remote),
]
np.savez(
    out + ".npz",
    answer=answer.numpy(),
    logits=model(**inputs).logits.detach().numpy(),
    hidden=loaded[-1](**inputs).last_hidden_state.detach().numpy(),
    **{name: value.numpy() for name, value in inputs.items()},
)
tokens = AutoTokenizer.from_pretrained(folder, **remote).tokenize("hello world")

model.save_pretrained(out + "-again")
processor.save_pretrained(out + "-again")
AutoModel.from_pretrained(out + "-again", **remote)
AutoProcessor.from_pretrained(out + "-again", **remote)

ours = [name for name in sys.modules if name.startswith("solo_vlm.")]
del sys.modules["solo_vlm"]
sys.path.append(source)
import solo_vlm
later = AutoModel.from_pretrained(folder, **remote)
facts = {
    "classes": {type(thing).__name__: type(thing).__module__ for thing in loaded},
    "tokens": tokens,
    "solo_vlm": ours,
    "later": type(later).__name__,
}
with open(out + ".json", "w") as file:
    json.dump(facts, file)
"""


@pytest.fixture(scope="module")
def elsewhere(published, photo, tmp_path_factory):
    """Return facts, arrays and printed text of a process without solo_vlm."""
    example = re.search(r"```python\n(.*?)```", (published / "README.md").read_text(), re.S)[1]
    example = example.replace('"owner/tiny-solo"', "folder")
    assert example.count("(folder,") == 2
    home = tmp_path_factory.mktemp("elsewhere")
    arguments = [published, sysconfig.get_path("purelib"), Path(solo_vlm.__file__).parents[1], home / "found"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ELSEWHERE.replace("EXAMPLE", example), *map(str, arguments)],
        cwd=photo.parent,
        env={"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((home / "found.json").read_text()), np.load(home / "found.npz"), done.stdout


def test_transformers_alone_loads_every_class(elsewhere):
    facts, _, _ = elsewhere
    assert facts["solo_vlm"] == []
    assert facts["classes"].keys() == {
        "SoloForConditionalGeneration",
        "SoloProcessor",
        "SoloConfig",
        "SoloImageProcessor",
        "SoloModel",
    }
    assert all(module.startswith("transformers_modules.") for module in facts["classes"].values())
    assert facts["later"] == "SoloModel"


def test_answers_and_logits_match_solo_vlm(elsewhere, published, home, photo):
    facts, found, printed = elsewhere
    model, processor = load_model(home / "sft/model", device="cpu"), load_processor(home / "sft/model")
    assert facts["tokens"] == processor.tokenizer.tokenize("hello world")
    content = [{"type": "image", "path": str(photo)}, {"type": "text", "text": "What is in this picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for name, value in inputs.items():
        np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)
    with torch.no_grad():
        logits = model(**inputs).logits
        hidden = model.model(**inputs).last_hidden_state
        answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    np.testing.assert_allclose(found["logits"], logits.numpy(), atol=1e-6, rtol=0)
    np.testing.assert_allclose(found["hidden"], hidden.numpy(), atol=1e-6, rtol=0)
    np.testing.assert_array_equal(found["answer"], answer.numpy())
    new = answer[0, inputs["input_ids"].shape[1] :]
    assert len(new) > 0
    assert printed.strip() == processor.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}])
def test_installed_solo_vlm_takes_precedence(options, published):
    classes = (AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor)
    for auto in classes:
        loaded = auto.from_pretrained(published, **options)
        assert type(loaded).__module__.startswith("solo_vlm."), auto
    assert AutoTokenizer.from_pretrained(published, **options).tokenize("hello")
    assert load_model(published).config.to_dict()["model_type"] == "solo"


def test_published_code_imports_nothing_of_solo_vlm(published):
    """Relative imports must stay within the folder."""
    for file in published.glob("*.py"):
        code = file.read_text()
        assert not re.search(r"^\s*(from|import) solo_vlm", code, re.M), file.name
        for module in re.findall(r"^\s*from \.(\w+) import", code, re.M):
            assert (published / f"{module}.py").is_file(), (file.name, module)
    assert {file.name for file in published.glob("*.py")} == {file.name for file in code_files()}


DESIGNED = """
import sys
folder, site, out = sys.argv[1:]
sys.path.append(site)
sys.modules["solo_vlm"] = None
import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
parts = [{"type": "image", "image": Image.radial_gradient("L")}, {"type": "text", "text": "what?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
np.save(out, model.generate(**inputs, max_new_tokens=8, do_sample=False).numpy())
"""


def test_other_designs_answer_alike_with_transformers_alone(tmp_path):
    llm, tokenizer = make_llm()
    design = ImageDesign("bidirectional", "2d", 10000.0, "conv")
    solo = compose(llm, tokenizer, design=design)
    solo.save(tmp_path / "model")
    (tmp_path / "published").mkdir()
    write_folder(tmp_path / "published", tmp_path / "model", card="")
    arguments = [tmp_path / "published", sysconfig.get_path("purelib"), tmp_path / "answer.npy"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", DESIGNED, *map(str, arguments)],
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pipeline = GenerationPipeline(solo.model, solo.processor)
    inputs = pipeline.encode([ask("what?", Image.radial_gradient("L"))])
    expected, _ = pipeline.generate(inputs, 8)
    assert np.load(tmp_path / "answer.npy").tolist() == expected.tolist()
