"""Chat templates that leave out turns or images are found, in models of any kind; as are missing ends."""

from __future__ import annotations

import pytest
from tests.check.test_probe import make_llava
from tests.factories import make_llm, make_solo
from tests.models.solo.chat_templates import CHATML

from solo_vlm.check.certificate import certify
from solo_vlm.check.chats import template
from solo_vlm.check.loading import load_probe
from solo_vlm.check.probe import Probe
from solo_vlm.check.settings import settings
from solo_vlm.data.encode import Encoder
from solo_vlm.models.from_llm import compose

ROLES = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list -%}"
LAST = "{%- if messages | length > 2 -%}{%- set messages = messages[-1:] -%}{%- endif -%}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
LLAVA = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} </s>"
    "{% endfor %}"
)


def failures(probe: Probe) -> dict:
    """Return the details of the properties that fail."""
    found = certify(probe, "model").findings
    return {name: finding.detail for name, finding in found.items() if finding.status == "fails"}


@pytest.mark.parametrize(
    ("dropped", "fault"),
    [
        (ROLES, "leaves out the system message of a chat (system, user) in silence: make it write all"),
        (LAST, "leaves out the user message of a chat (user, assistant, user) in silence: make it write all"),
    ],
    ids=["system", "earlier turns"],
)
@pytest.mark.parametrize("kind", ["solo", "llm"])
def test_template_that_leaves_out_a_turn_is_found(kind, dropped, fault):
    llm, tokenizer = make_llm()
    if kind == "solo":
        solo = make_solo()
        probe = Probe(solo.model, Encoder(solo.processor))
        holder = solo.processor
    else:
        probe, holder = Probe(llm, Encoder(tokenizer)), tokenizer
        holder.chat_template = CHATML
    holder.chat_template = dropped + holder.chat_template
    found = failures(probe)
    assert found.keys() == {"template"}
    assert found["template"].startswith(fault)


def test_template_that_leaves_out_an_image_is_found():
    solo = make_solo()
    solo.processor.chat_template = solo.processor.chat_template.replace("'<vpatch>'", "''")
    found = failures(Probe(solo.model, Encoder(solo.processor)))
    assert found.keys() == {"template"}
    assert found["template"].startswith("leaves out an image of user turn 1 in silence")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("<image>", "{{ '<image>' if loop.first else '' }}"), "leaves out an image of user turn 1"),
        (("messages %}", "messages if message['role'] != 'system' %}"), "leaves out the system message"),
    ],
    ids=str,
)
def test_template_of_another_image_text_model_is_checked(change, fault, tmp_path):
    make_llava(tmp_path, LLAVA)
    assert template(load_probe(str(tmp_path))).status == "holds"
    make_llava(tmp_path, LLAVA.replace(*change))
    found = template(load_probe(str(tmp_path)))
    assert found.status == "fails"
    assert fault in found.detail


def test_template_that_rejects_system_messages_holds():
    llm, tokenizer = make_llm()
    tokenizer.chat_template = NO_SYSTEM + CHATML
    found = template(Probe(llm, Encoder(tokenizer)))
    assert (found.status, "rejects system messages" in found.detail) == ("holds", True)


def test_end_of_turn_that_an_llm_does_not_stop_at_is_found():
    """`solo init` adds it."""
    llm, tokenizer = make_llm()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    llm.resize_token_embeddings(len(tokenizer))
    finding = settings(Probe(llm, Encoder(tokenizer)))
    assert finding.status == "differs"
    assert "eos_token_id lacks '<|im_end|>'" in finding.detail
    solo = compose(llm, tokenizer)
    assert settings(Probe(solo.model, Encoder(solo.processor))).status == "holds"


def test_init_replaces_or_restricts_what_would_leave_out_turns(caplog):
    for dropped in (ROLES, LAST):
        llm, tokenizer = make_llm()
        tokenizer.chat_template = dropped + CHATML
        solo = compose(llm, tokenizer)
        assert template(Probe(solo.model, Encoder(solo.processor))).status == "holds"
