"""Chat templates: the paper's own for base models, the release's, and a wrapper that lets any take images."""

from __future__ import annotations

# SOLO paper and release: <s>[INST] question [/INST]answer</s>, repeated. A system prompt opens the first
# user turn. An image stands where its content part stands, inside the user turn.
SOLO_CHAT_TEMPLATE = """\
{%- if bos_token -%}{{ bos_token }}{%- endif -%}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = message['content'] + '\\n' -%}
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
_RELEASE_CHAT_TEMPLATE = """\
{%- set ns = namespace(system='', bos=bos_token or '') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = message['content'] + '\\n' -%}
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


def release_chat_template(image_token: str) -> str:
    """The chat template of the layout "release"; see `SoloProcessor`."""
    return with_images(_RELEASE_CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token), image_token)
