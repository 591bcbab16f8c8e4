"""Chat templates: the paper's, the original SOLO code's, ChatML, and a wrapper that lets any take images."""

from __future__ import annotations

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
