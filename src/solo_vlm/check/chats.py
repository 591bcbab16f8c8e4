"""Chat template of any model: whether it writes every turn and image, and the tokens that end answers."""

from __future__ import annotations

from collections.abc import Sequence

from solo_vlm.check.probe import Probe
from solo_vlm.check.properties import Finding
from solo_vlm.models.solo.bounded_template import render
from solo_vlm.models.solo.chat_template import (
    PROMPTS,
    ChatTemplateError,
    Message,
    Render,
    end_tokens,
    left_out,
)
from solo_vlm.utils.errors import first_line

_ANSWER = {"role": "assistant", "content": "Hello."}
_REMEDY = "make it write all of them, or call raise_exception"


def template(probe: Probe) -> Finding:
    """Render prompts of several shapes, in which every message and image has to appear.

    A template may reject system messages, but not leave them out.
    """
    if (apply := renderer(probe)) is None:
        return Finding("skipped", "no chat template")
    rejects_system = False
    for roles in PROMPTS:
        try:
            role = left_out(roles, apply)
        except ChatTemplateError as error:
            if roles[0] != "system":
                return Finding("fails", f"{error} ({', '.join(roles)})")
            rejects_system = True
            continue
        if role:
            shape = ", ".join(roles)
            return Finding(
                "fails", f"leaves out the {role} message of a chat ({shape}) in silence: {_REMEDY}"
            )
    if fault := _fault_of_images(probe, apply):
        return Finding("fails", fault)
    note = "; rejects system messages" if rejects_system else ""
    return Finding("holds", f"chats of up to {max(map(len, PROMPTS))} messages{note}")


def renderer(probe: Probe) -> Render | None:
    """Return the function that applies the model's chat template; None without one."""
    tokenizer = probe.tokenizer
    holder = probe.processor or (probe.encoder and probe.encoder.processor)
    source = getattr(holder, "chat_template", None)
    if isinstance(source, dict):
        source = source.get("default")
    if not source or tokenizer is None:
        return None

    def apply(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if probe.processor is not None:  # such templates may not take text as it is
            messages = [{**message, "content": _parts(message["content"])} for message in messages]
        try:
            return render(source, messages, add_generation_prompt, tokenizer.special_tokens_map)
        except Exception as error:  # templates raise errors of any type
            raise ChatTemplateError(f"the chat template rejects a chat: {first_line(error)}") from error

    return apply


def answer_ends(probe: Probe) -> set[int]:
    """Return the IDs of EOS and of the tokens that the chat template writes after answers."""
    tokenizer = probe.tokenizer
    if probe.encoder and probe.sees_images:
        return set(probe.encoder.processor.end_of_turn_ids)
    if tokenizer.eos_token is None:
        return set()
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    candidates = added - {tokenizer.bos_token} | {tokenizer.eos_token}
    apply = renderer(probe)
    ends = end_tokens(apply, candidates, tokenizer.eos_token) if apply else {tokenizer.eos_token}
    return set(tokenizer.convert_tokens_to_ids(sorted(ends)))


def _fault_of_images(probe: Probe, apply: Render) -> str | None:
    """Compare prompts with more and more images, which must differ."""
    if not (probe.sees_images or probe.is_foreign):
        return None
    for before in ([], [_asked(1), _ANSWER]):
        try:
            texts = {apply([*before, _asked(images)], True) for images in range(3)}
        except ChatTemplateError:  # models of one image may reject more
            continue
        if len(texts) < 3:
            return f"leaves out an image of user turn {len(before) // 2 + 1} in silence: {_REMEDY}"
    return None


def _asked(images: int) -> Message:
    parts: list[Message] = [{"type": "image"}] * images
    return {"role": "user", "content": [*parts, {"type": "text", "text": "Hi."}]}


def _parts(content: str | list[Message]) -> list[Message]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
