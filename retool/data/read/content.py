"""The content of a message as text: a string as it is, a list of parts joined."""

from __future__ import annotations

import re
from typing import Any

from retool.data.read.chunk import RowError

SURROGATE = re.compile("[\ud800-\udfff]")
AS_TEXT = "store it as text, for example as its JSON"
THOUGHT_PARTS = ("thinking", "reasoning")  # types; the text stands under that name, or `text`


def text_and_thought(content: Any, where: str) -> tuple[str, str]:
    """The text of a content, and what parts ahead of it say was thought ("" where there is none).

    Raises RowError for what isn't text, and for a thought behind text, which no field could put in
    its place.
    """
    said: list[str] = []
    thought: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict):
            said.append(_text(part, f"{where}: content"))
            continue
        kind = part.get("type", "text")
        if kind in THOUGHT_PARTS:
            if "".join(said).strip():
                raise RowError(
                    f"{where}: content has a part of type {kind!r} behind text: write it into the "
                    "text, as <think>…</think>."
                )
            words = part.get(kind, part.get("text"))
            thought.append(_text(words, f"{where}: the part of type {kind!r}"))
        elif kind == "text" and "text" not in part and "type" not in part:
            raise RowError(f"{where}: content is a dict, not text: {AS_TEXT}.")
        elif kind == "text":
            said.append(_text(part.get("text"), f"{where}: content"))
        else:
            raise RowError(
                f"{where}: content has a part of type {kind!r}; only text parts can be trained."
            )
    return "".join(said), "\n\n".join(thought)


def _text(value: Any, what: str) -> str:
    if isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value
    ):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise RowError(f"{what} is {type(value).__name__}, not text: {AS_TEXT}.")
    if SURROGATE.search(value):
        raise RowError(
            f"{what} isn't valid Unicode (bytes that aren't UTF-8, or half of a surrogate pair)."
        )
    return value
