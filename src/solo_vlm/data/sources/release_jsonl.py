"""The release's pre-training data: JSON lines of chats with base64 images, in four shapes."""

from __future__ import annotations

from typing import Any


def as_chat_row(value: Any) -> Any:
    """Bring any of the release's shapes into the schema's; leave everything else as it is.

    The shapes: `{"messages": [turn, ...]}`, `{"id", "conversations": [turn, ...]}`, a list of turns, and one
    turn alone. A turn has `role` and `content`: a string, or parts of text and `image_url`.
    """
    if isinstance(value, list):
        return {"messages": value}
    if not isinstance(value, dict) or "messages" in value:
        return value
    if _are_turns(value.get("conversations")):
        return {**value, "messages": value["conversations"]}
    return {"messages": [value]} if _are_turns([value]) else value


def _are_turns(turns: Any) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    )
