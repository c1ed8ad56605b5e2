"""What the columns of a row become: a list of messages in OpenAI's form, still unchecked.

Every form of `row_format` ends here, so that one set of checks does for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from retool.data.read.chunk import RowError
from retool.data.read.containers import plain
from retool.data.read.content import text_and_thought
from retool.data.read.row_format import RowFormat

# of messages found as text
AS_LIST = "store it as a list, or decode it in a function of yours (data.custom_cls.path, name)"
CALLS = ("function_call", "tool_call")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
    **dict.fromkeys(CALLS, "assistant"),
}


def raw_messages(row: Mapping[str, Any], form: RowFormat, where: str) -> list[dict[str, Any]]:
    """The messages of a row whose form is settled. Raises RowError for what isn't one."""
    return _with_system(row, _without_system(row, form, where), where)


def prompt_messages(raw: Any, key: str, where: str) -> Any:
    """What reinforcement learning asks, still unchecked: a column's messages, or its text as the
    user's. RowError for messages that are text.
    """
    asked = plain(raw)
    if not isinstance(asked, str):
        return asked
    if _messages_as_text(asked):
        raise RowError(f"{where}: {key!r} is a list of messages as JSON text: {AS_LIST}.")
    return [{"role": "user", "content": asked}]


def _messages_as_text(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return bool(found) and all(isinstance(message, dict) and "role" in message for message in found)


def _without_system(row: Mapping[str, Any], form: RowFormat, where: str) -> list[dict[str, Any]]:
    if form.format in ("messages", "sharegpt"):
        key = form.layout.needed[0]
        return _as_list(plain(row[key]), key, where)
    if form.format == "alpaca":
        return _alpaca(row, where)
    asked, answered = form.layout.needed
    return [*_said_by("user", row, asked, where), *_said_by("assistant", row, answered, where)]


def _as_list(raw: Any, key: str, where: str) -> list[dict[str, Any]]:
    """Messages given as a list of mappings, those of ShareGPT's form converted."""
    if isinstance(raw, list) and raw and all(isinstance(message, dict) for message in raw):
        return [_of_speaker(message, f"{where}, message {i}") for i, message in enumerate(raw)]
    if isinstance(raw, list):
        found = f"a list of {type(raw[0]).__name__}" if raw else "empty"
    else:
        found = type(raw).__name__
    way_out = f": {AS_LIST}" if isinstance(raw, str) else ""
    raise RowError(f"{where}: {key!r} isn't a list of messages ({found}){way_out}.")


def _said_by(role: str, row: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """What a column says: a text by `role`, or messages."""
    raw = plain(row[key])
    if isinstance(raw, str):
        return [{"role": role, "content": raw}]
    if role == "assistant" and not isinstance(raw, list):
        raise RowError(f"{where}: {key!r} is {type(raw).__name__}, not text.")
    return _as_list(raw, key, where)


# --- ShareGPT ---


def _of_speaker(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message that says `from` and `value` as one with `role` and `content`; others unchanged."""
    if message.get("role") is not None or message.get("from") is None:
        return message
    speaker = message["from"]
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(SPEAKERS)
        raise RowError(f"{where}: unknown speaker {speaker!r} in 'from'; known are {known}.")
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "role")}
    value = message.get("value")
    if speaker in CALLS:
        return {**rest, "role": role, "content": "", "tool_calls": _calls(value, where)}
    return {**rest, "role": role, "content": value}


def _calls(value: Any, where: str) -> list[Any]:
    """The call that a `function_call` holds as JSON, or the list of them."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(
            f"{where}: its value isn't a call in JSON ({error}), such as "
            '{"name": "f", "arguments": {}}.'
        ) from error
    return calls if isinstance(calls, list) else [calls]


def _with_system(
    row: Mapping[str, Any], messages: list[dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    """The messages behind what the column `system` says, unless the first of them says it already."""
    system = plain(row.get("system"))
    if system is None or system == "":
        return messages
    if not isinstance(system, (str, list)):
        kind = type(system).__name__
        raise RowError(
            f"{where}: its column 'system' is {kind}, not text: rename it, if it isn't a system prompt."
        )
    first = messages[0] if messages else {}
    role = first.get("role")
    if role in ("system", "developer"):
        said = text_and_thought(first.get("content"), f"{where}, message 0")[0]
        if said.strip() == text_and_thought(system, f"{where}: its column 'system'")[0].strip():
            return messages
    if role == "system":
        raise RowError(f"{where}: its column and its message 'system' differ: keep one of them.")
    return [{"role": "system", "content": system}, *messages]


# --- Alpaca ---


def _alpaca(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """An instruction, its input a paragraph of its own, and the output; earlier rounds before them."""
    texts = {key: plain(row.get(key)) for key in ("instruction", "input", "output")}
    for key, text in texts.items():
        if not isinstance(text, str) and (text is not None or key == "output"):
            raise RowError(f"{where}: {key!r} is {type(text).__name__}, not text.")
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    rounds = [*_history(plain(row.get("history")), where), (asked, texts["output"])]
    return [
        {"role": role, "content": text}
        for pair in rounds
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _history(rounds: Any, where: str) -> list[tuple[Any, Any]]:
    """Earlier rounds: pairs of an instruction and its output."""
    if rounds is None or rounds == "":
        return []
    if not isinstance(rounds, list) or not all(
        isinstance(entry, list) and len(entry) == 2 for entry in rounds
    ):
        raise RowError(f"{where}: 'history' isn't a list of [instruction, output].")
    return [(asked, answered) for asked, answered in rounds]
