"""Chat templates: the paper's, the original SOLO code's, ChatML, and a wrapper that lets any take images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

# SOLO paper: <s>[INST] question [/INST]answer</s>, repeated. System messages open the next user turn. An
# image stands where its content part stands, inside the user turn.
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

# What SOLO-7B was fine-tuned with: the same, but a turn's images stand before it (the first turn's before
# <s>), and white space around a question is cut.
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

# For LLMs that know ChatML's tokens, but whose own template cannot be trained on as it is.
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

# Shadows the function of transformers that gives the present time: prompts would change from day to day.
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

# Turns content parts into one string a message, so that a template made for text alone needs no change.
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


def with_images(chat_template: str, image_token: str) -> str:
    """Let a chat template take messages whose content is a list of text and image parts.

    Args:
        chat_template: Jinja source of an LLM's template, which sees string contents only.
        image_token: placeholder that an image part becomes; the processor expands it.
    """
    return _FLATTEN_CONTENT.replace("IMAGE_TOKEN", image_token) + chat_template


def has_date(chat_template: str) -> bool:
    """Return whether a chat template may write the present date."""
    return "strftime_now" in chat_template


def with_fixed_date(chat_template: str) -> str:
    """Let a chat template that writes the present date write 1 January 2025."""
    return _FIXED_DATE + chat_template if has_date(chat_template) else chat_template


def is_original_template(chat_template: str | None) -> bool:
    """Return whether a chat template is that of the layout "release", maybe of an older version."""
    return _ORIGINAL_CHAT_TEMPLATE.splitlines()[0] in (chat_template or "")


def original_chat_template(image_token: str) -> str:
    """The chat template of the layout "release"; see `SoloProcessor`."""
    return with_images(_ORIGINAL_CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token), image_token)


# --- turns of a rendered chat --------------------------------------------------------------------

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]  # (messages, add_generation_prompt) to text

_MARK = "\ue002{index}\ue003"


class ChatTemplateError(ValueError):
    """A chat that the template refuses, or a template whose answers cannot be told from its prompts."""


def cut_turns(
    messages: Sequence[Message],
    add_generation_prompt: bool,
    render: Render,
    ends: Collection[str],
    eos_token: str,
) -> list[tuple[str, bool]]:
    """Cut a rendered chat where answers begin and end.

    An answer begins where the generation prompt for it ends: training then sees the prompts of inference.
    It ends with the token that the template writes behind it, or with EOS where the template ends there.

    Args:
        messages: with strings as contents.
        add_generation_prompt: render the beginning of one more answer.
        render: applies the chat template.
        ends: tokens that may end an answer.
        eos_token: ends the last answer of a template that writes nothing behind it.

    Returns:
        (text, whether the assistant says it), in order; together the rendered chat, white space at its end
        left out.

    Raises:
        ChatTemplateError: the template renders an answer, or the prompt for it, in another way than
            generation would meet it, or writes no token at the end of an answer.
    """
    whole = render(messages, add_generation_prompt)
    segments, done = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _prompt(messages, index, render)
        if not whole.startswith(prompt) or len(prompt) < done:
            raise ChatTemplateError(
                "the chat template renders a turn differently once other turns follow, so that training and "
                "inference would disagree"
            )
        said = message["content"].strip()
        start = _skip_space(whole, len(prompt))
        if not whole.startswith(said, start):
            raise ChatTemplateError(
                f"the chat template changes what the assistant says in message {index + 1}, or writes "
                "something before it that generation's prompt lacks"
            )
        behind = _skip_space(whole, start + len(said))
        end = max((token for token in ends if whole.startswith(token, behind)), key=len, default=None)
        if end is None and (behind < len(whole) or add_generation_prompt):
            raise ChatTemplateError(
                f"the chat template writes no token at the end of message {index + 1}, an answer: generation "
                "would not end there"
            )
        place = start + len(said) if end is None else behind
        segments += [
            (whole[done : len(prompt)], False),
            (whole[len(prompt) : place] + (end or eos_token), True),
        ]
        done = len(whole) if end is None else behind + len(end)
    tail = whole[done:]
    if tail if add_generation_prompt else tail.strip():
        segments.append((tail, False))
    return [segment for segment in segments if segment[0]]


def end_tokens(render: Render, candidates: Collection[str], eos_token: str) -> set[str]:
    """Return the tokens that a chat template ends answers with, and EOS.

    Args:
        render: applies the chat template.
        candidates: tokens that may end an answer.
        eos_token: ends it where the template ends there.
    """
    ends, answer = {eos_token}, "Hello."
    turn = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": answer}]
    for turns in (1, 2):
        try:
            segments = cut_turns(turn * turns, False, render, candidates, eos_token)
        except ChatTemplateError:  # such chats are not trained on
            continue
        ends |= {text.strip().removeprefix(answer).strip() for text, said in segments if said}
    return ends


def check_roles(roles: Sequence[str], render: Render) -> None:
    """Make sure that a chat template keeps every message of a chat with these roles, in order.

    Raises:
        ChatTemplateError: naming the message that it leaves out or moves.
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
    """The text that generation of this message would go on from."""
    if index:
        return render(messages[:index], True)
    # No template renders an empty chat: what it writes before a first answer, whatever that says.
    mark = _MARK.format(index=0)
    return render([{**messages[0], "content": mark}, *messages[1:]], False).partition(mark)[0]


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place
