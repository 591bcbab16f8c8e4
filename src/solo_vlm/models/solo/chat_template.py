"""Chat templates (the paper's, the original SOLO code's, ChatML), and the turns of a rendered chat.

`with_images` lets any LLM's template take images; `cut_turns` finds the assistant's text in what a template
renders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

# SOLO paper: <s>[INST] question [/INST]answer</s>, repeated. System messages open the next user turn. Images
# stay where their content parts are, inside the user turn.
SOLO_CHAT_TEMPLATE = """\
{%- if bos_token -%}{{ bos_token }}{%- endif -%}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = ns.system + message['content'] + '\\n' -%}
  {%- elif message['role'] == 'user' -%}
    {{- '[INST] ' + ns.system + message['content'] + ' [/INST]' -}}
    {%- set ns.system = '' -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- raise_exception("roles are 'system', 'user' and 'assistant', not '" + message['role'] + "'") -}}
  {%- endif -%}
{%- endfor -%}
"""

# SOLO-7B was fine-tuned with the same, except that the images of a turn precede it (those of the first turn
# precede <s>), and white space around a question is stripped.
_ORIGINAL_CHAT_TEMPLATE = """\
{%- set ns = namespace(system='', bos=bos_token or '') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = ns.system + message['content'] + '\\n' -%}
  {%- elif message['role'] == 'user' -%}
    {{- 'IMAGE_TOKEN' * message['content'].count('IMAGE_TOKEN') + ns.bos -}}
    {{- '[INST] ' + (ns.system + message['content'].replace('IMAGE_TOKEN', '')).strip() + ' [/INST]' -}}
    {%- set ns.system = '' -%}
    {%- set ns.bos = '' -%}
  {%- elif message['role'] == 'assistant' -%}
    {{- ns.bos -}}{%- set ns.bos = '' -%}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- raise_exception("roles are 'system', 'user' and 'assistant', not '" + message['role'] + "'") -}}
  {%- endif -%}
{%- endfor -%}
"""

# For LLMs that have ChatML's tokens but whose own template is unsuitable for training.
CHATML_TEMPLATE = """\
{%- if bos_token and bos_token != '<|im_start|>' -%}{{ bos_token }}{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
  {%- elif message['role'] in ('system', 'user') -%}
    {{- message['content'] + '<|im_end|>\\n' -}}
  {%- else -%}
    {{- raise_exception("roles are 'system', 'user' and 'assistant', not '" + message['role'] + "'") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# Shadows transformers' function for the current time, which would change prompts from day to day.
_FIXED_DATE = """\
{%- macro strftime_now(format) -%}
  {%- set date = namespace(text=format) -%}
  {%- for code, value in [('%d', '01'), ('%-d', '1'), ('%m', '01'), ('%B', 'January'), ('%b', 'Jan'),
                          ('%Y', '2025'), ('%y', '25'), ('%A', 'Wednesday'), ('%a', 'Wed'),
                          ('%H', '00'), ('%M', '00'), ('%S', '00')] -%}
    {%- set date.text = date.text.replace(code, value) -%}
  {%- endfor -%}
  {{- date.text -}}
{%- endmacro -%}
"""

# Joins content parts into one string per message, so text-only templates need no change.
_FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string or message['content'] is none -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set part_text = namespace(value='') -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {%- set part_text.value = part_text.value + part['text'] -%}
      {%- elif part['type'] in ('image', 'image_url') -%}
        {%- set part_text.value = part_text.value + 'IMAGE_TOKEN' -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=part_text.value)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

_REJECT_SYSTEM = """\
{%- for message in messages if message['role'] == 'system' -%}
  {{- raise_exception('this chat template would leave out system messages') -}}
{%- endfor -%}
"""


def with_images(chat_template: str, image_token: str) -> str:
    """Return a chat template that also takes lists of text and image parts as content.

    Args:
        chat_template: Jinja source of an LLM's template for string contents.
        image_token: Placeholder of an image part, which the processor expands.
    """
    return _FLATTEN_CONTENT.replace("IMAGE_TOKEN", image_token) + chat_template


def without_system(chat_template: str) -> str:
    """Return a chat template that rejects system messages."""
    return _REJECT_SYSTEM + chat_template


def has_date(chat_template: str) -> bool:
    """Return whether a chat template may write the current date."""
    return "strftime_now" in chat_template


def with_fixed_date(chat_template: str) -> str:
    """Return the chat template with the current date fixed to 1 January 2025."""
    return _FIXED_DATE + chat_template if has_date(chat_template) else chat_template


def is_original_template(chat_template: str | None) -> bool:
    """Return whether a chat template is the one of the layout "original", perhaps an older version."""
    return _ORIGINAL_CHAT_TEMPLATE.splitlines()[0] in (chat_template or "")


def original_chat_template(image_token: str) -> str:
    """Return the chat template of the image layout "original"; see `SoloProcessor`."""
    return with_images(_ORIGINAL_CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token), image_token)


# --- turns of a rendered chat --------------------------------------------------------------------

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]  # (messages, add_generation_prompt) to text

_MARK = "\ue002{index}\ue003"

PROMPTS = [
    (*system, *turns * ("user", "assistant"), "user") for system in ((), ("system",)) for turns in range(3)
]
"""Roles of chats that wait for an answer, with and without a system message."""


class ChatTemplateError(ValueError):
    """Chat that the template rejects, or whose answers cannot be separated from its prompts."""


def cut_turns(
    messages: Sequence[Message],
    add_generation_prompt: bool,
    render: Render,
    ends: Collection[str],
    eos_token: str,
) -> list[tuple[str, bool]]:
    """Cut a rendered chat where answers begin and end.

    An answer begins where its generation prompt ends, so training sees the prompts of inference. It ends with
    the token that the template writes after it, or with EOS if the template ends there.

    Args:
        messages: Messages with string contents.
        add_generation_prompt: Render the prompt for one more answer.
        render: Function that applies the chat template.
        ends: Tokens that may end an answer.
        eos_token: Token that ends the last answer if the template writes nothing after it.

    Returns:
        (text, is_answer) segments in order; together they are the rendered chat without trailing white space.

    Raises:
        ChatTemplateError: The template renders an answer or its prompt differently than in generation, or
            writes no token at the end of an answer.
    """
    whole = render(messages, add_generation_prompt)
    segments, done = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _prompt(messages, index, render)
        if not whole.startswith(prompt) or len(prompt) < done:
            raise ChatTemplateError(
                "the chat template renders a turn differently once other turns follow, so training and "
                "inference would disagree"
            )
        answer = message["content"].strip()
        start = _skip_space(whole, len(prompt))
        if not whole.startswith(answer, start):
            raise ChatTemplateError(
                f"the chat template changes the assistant's text in message {index + 1}, or writes something "
                "before it that the generation prompt lacks"
            )
        after = _skip_space(whole, start + len(answer))
        end = max((token for token in ends if whole.startswith(token, after)), key=len, default=None)
        if end is None and (after < len(whole) or add_generation_prompt):
            raise ChatTemplateError(
                f"the chat template writes no token at the end of message {index + 1}, an answer: "
                "generation would not end there"
            )
        stop = start + len(answer) if end is None else after
        segments += [
            (whole[done : len(prompt)], False),
            (whole[len(prompt) : stop] + (end or eos_token), True),
        ]
        done = len(whole) if end is None else after + len(end)
    tail = whole[done:]
    if tail if add_generation_prompt else tail.strip():
        segments.append((tail, False))
    return [segment for segment in segments if segment[0]]


def end_tokens(render: Render, candidates: Collection[str], eos_token: str) -> set[str]:
    """Return the tokens that end answers of a chat template, and EOS.

    Args:
        render: Function that applies the chat template.
        candidates: Tokens that may end an answer.
        eos_token: The tokenizer's EOS token.
    """
    ends, answer = {eos_token}, "Hello."
    turn = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": answer}]
    for turns in (1, 2):
        try:
            segments = cut_turns(turn * turns, False, render, candidates, eos_token)
        except ChatTemplateError:  # such chats are skipped in training
            continue
        ends |= {text.strip().removeprefix(answer).strip() for text, is_answer in segments if is_answer}
    return ends


def left_out(roles: Sequence[str], render: Render) -> str | None:
    """Return the role of a message that a chat template leaves out of a prompt without an error, or None.

    Args:
        roles: Roles of the messages of a chat.
        render: Function that applies the chat template.

    Raises:
        ChatTemplateError: The template rejects the chat.
    """
    marks = [_MARK.format(index=index) for index in range(len(roles))]
    text = render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)], True)
    return next((role for role, mark in zip(roles, marks, strict=True) if mark not in text), None)


def drops_system(render: Render) -> bool:
    """Return whether a chat template leaves out a message of a chat with a system message without error."""
    for roles in PROMPTS:
        try:
            if roles[0] == "system" and left_out(roles, render):
                return True
        except ChatTemplateError:  # then nothing is left out in silence
            continue
    return False


def check_roles(roles: Sequence[str], render: Render) -> None:
    """Check that a chat template keeps every message of a chat with these roles, in order.

    Raises:
        ChatTemplateError: The template omits, repeats or moves a message.
    """
    marks = [_MARK.format(index=index) for index in range(len(roles))]
    text = render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)], False)
    place = 0
    for index, (role, mark) in enumerate(zip(roles, marks, strict=True)):
        if mark not in text:
            raise ChatTemplateError(f"the chat template leaves out message {index + 1} ({role})")
        if text.count(mark) > 1 and role == "assistant":
            raise ChatTemplateError(f"the chat template repeats message {index + 1} ({role})")
        if (found := text.find(mark, place)) < 0:
            raise ChatTemplateError(f"the chat template moves message {index + 1} ({role})")
        place = found


def _prompt(messages: Sequence[Message], index: int, render: Render) -> str:
    """Return the prompt that generation of this message would continue."""
    if index:
        return render(messages[:index], True)
    # Templates render no empty chat, so this is the text before a first answer of any content.
    mark = _MARK.format(index=0)
    return render([{**messages[0], "content": mark}, *messages[1:]], False).partition(mark)[0]


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place
