"""Find in a rendered chat what the assistant says, whatever the chat template writes around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

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
