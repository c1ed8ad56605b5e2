"""Calls that are JSON: `{"name": …, "arguments": {…}}`, alone or in a list."""

from __future__ import annotations

import json
import re
from typing import Any

from retool.rl.agent.reading.call import Call, unreadable

SPACE = re.compile(r"\s*")


def read_json(
    text: str,
    start: int,
) -> tuple[Any, int]:
    """The JSON value at `start`, or after white space, and where it ends.

    Raises ValueError with what is wrong with it, however deep or long it is.
    """
    start = skip_space(text, start)
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos - start}"
        raise ValueError(f"isn't valid JSON ({reason})") from None
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"isn't valid JSON ({error})") from None


def skip_space(
    text: str,
    start: int,
) -> int:
    """Where the white space that may be at `start` ends."""
    space = SPACE.match(text, start)
    return start if space is None else space.end()


def call_of_json(
    value: Any,
    shape: str,
) -> Call:
    """The call that a JSON value is; `shape` says in a problem what it should have been.

    Arguments that are a string holding a JSON object are unwrapped; other strings stay. They may be
    called `parameters`, as Llama's are.
    """
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return unreadable("the tool call has no function name", shape)
    # Llama 3 calls them parameters.
    arguments = value.get("arguments", value.get("parameters", {}))
    # Some models write arguments as a string that holds JSON, as OpenAI's API has them.
    if isinstance(arguments, str):
        arguments = _unwrapped(arguments)
    given = value.get("id")
    return Call(name, arguments, id=given if isinstance(given, str) else "")


def calls_of_json(
    value: Any,
    shape: str,
) -> list[Call]:
    """The calls of a JSON value: a list of them, or a single one."""
    entries = value if isinstance(value, list) else [value]
    if not entries:
        return [unreadable("the list of tool calls is empty", shape)]
    return [call_of_json(entry, shape) for entry in entries]


def _unwrapped(text: str) -> Any:
    """The JSON object that a string holds, or the string."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
