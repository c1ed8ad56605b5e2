"""From a raw row to a checked `Conversation`.

Containers are converted, absent fields dropped, and every doubt is an error that names the row.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retool.data.read.chunk import RowError
from retool.data.read.containers import plain, without_nulls
from retool.data.read.content import text_and_thought
from retool.data.read.raw_messages import raw_messages
from retool.data.read.row_format import LEGACY_TOOLS, RowFormat
from retool.data.tokens.control_tokens import Masks

ROLES = ("system", "developer", "user", "assistant", "tool")
# Whether a message is trained: ours and OpenAI's name; those of Axolotl and ms-swift, true or false
WEIGHTS = ("loss_mask", "weight")
SWITCHES = ("train", "training", "loss")
TOO_DEEP = "it is nested too deeply to be read."


@dataclass(frozen=True)
class Conversation:
    """One checked row.

    It holds plain Python containers and no null field; `arguments` are parsed, `content` is always
    text, and `loss_mask` of a message is 0 or 1 where it was given. `file` and `row` say where it
    is from, for error texts. `masks`: the control tokens in its texts are hidden in this way (see
    `control_tokens`).
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool | None = None
    file: str = "conversation"
    row: int = 0
    masks: Masks | None = None

    @property
    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def error(self, why: str, turn: int | None = None) -> RowError:
        """The error for this row, and for message `turn` of it."""
        place = "" if turn is None else f", message {turn} ({self.messages[turn]['role']})"
        told = self.masks.told(why) if self.masks is not None else why
        return RowError(f"{self.file}, row {self.row}{place}: {told}")


def to_conversation(
    row: Mapping[str, Any],
    file: str,
    index: int,
    form: RowFormat | None = None,
    prompt_only: bool = False,
) -> Conversation:
    """Check and convert one raw row.

    `prompt_only` allows rows without an assistant turn (RL prompts).

    Raises RowError naming file, row and message for anything that isn't exactly what it should be.
    """
    try:
        return _converted(row, file, index, form or RowFormat(), prompt_only)
    except RecursionError as error:
        raise RowError(f"{file}, row {index}: {TOO_DEEP}") from error


def undeclared_calls(conversation: Conversation) -> Counter[str]:
    """How often a conversation calls each tool that its `tools` doesn't declare."""
    known = {tool.get("function", tool)["name"] for tool in conversation.tools or []}
    names = (
        call["function"]["name"]
        for message in conversation.messages
        for call in message.get("tool_calls", [])
    )
    return Counter(name for name in names if name not in known)


def _converted(
    row: Mapping[str, Any], file: str, index: int, form: RowFormat, prompt_only: bool
) -> Conversation:
    where = f"{file}, row {index}"
    try:
        form = form.settled(row.keys(), f"{where}: it")
    except ValueError as error:
        raise RowError(str(error)) from error
    raw = raw_messages(row, form, where)
    messages = [_message(message, f"{where}, message {i}") for i, message in enumerate(raw)]
    _check_order(messages, where, prompt_only)
    thinking = plain(row.get(form.enable_thinking_key))
    if thinking is not None and not isinstance(thinking, bool):
        raise RowError(f"{where}: {form.enable_thinking_key!r} is {thinking!r}, not true or false.")
    return Conversation(messages, _tools_of(row, form, where), thinking, file, index)


def _check_order(messages: Sequence[dict[str, Any]], where: str, prompt_only: bool) -> None:
    roles = [message["role"] for message in messages]
    after_instructions = [role for role in roles if role not in ("system", "developer")]
    if after_instructions[:1] == ["assistant"]:
        raise RowError(
            f"{where}: the first turn is the assistant's; it has nothing to answer. Begin with a user "
            "message."
        )
    if "assistant" not in roles and not prompt_only:
        raise RowError(f"{where}: there is no assistant turn, so nothing to train.")


# --- tools ---


def _tools_of(row: Mapping[str, Any], form: RowFormat, where: str) -> list[dict[str, Any]] | None:
    """The tools of a row, or what it has in the older form of OpenAI's."""
    tools = _tools(plain(row.get(form.tools_key)), form.tools_key, where)
    if tools is not None and form.format == "sharegpt":
        tools = _wrapped(tools)
    if form.tools_key != "tools":
        return tools
    functions = _legacy_tools(plain(row.get(LEGACY_TOOLS)), where)
    if not functions:
        return tools
    if tools is not None and tools != functions:
        raise RowError(f"{where}: 'tools' and {LEGACY_TOOLS!r} differ: keep one of them.")
    return functions


def _legacy_tools(raw: Any, where: str) -> list[dict[str, Any]]:
    """Tools given as `functions`; none where a column of that name holds something else."""
    if not raw or (isinstance(raw, str) and not raw.lstrip().startswith("[")):
        return []
    if isinstance(raw, list) and not all(isinstance(entry, dict) for entry in raw):
        return []
    bodies = _tools(raw, LEGACY_TOOLS, where) or []
    return _wrapped(bodies)


def _wrapped(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Schemas as OpenAI's `tools` has them: a bare function is put into one."""
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _tools(raw: Any, key: str, where: str) -> list[dict[str, Any]] | None:
    """The schemas in a column, a list or its JSON text; None where it holds none."""
    if isinstance(raw, str):
        try:
            tools = json.loads(raw) if raw.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(
                f"{where}: {key!r} is text but not JSON: {error.msg} at character {error.pos}."
            ) from error
    else:
        tools = without_nulls(raw)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise RowError(
            f"{where}: {key!r} is a {type(tools).__name__}, not a list of function schemas."
        )
    for i, tool in enumerate(tools):
        body = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(body, dict) or not isinstance(body.get("name"), str):
            raise RowError(f"{where}: tool {i} of {key!r} isn't a function schema with a name.")
    return tools


# --- messages ---


def _message(raw: dict[str, Any], where: str) -> dict[str, Any]:
    # `arguments` given as a dict loses its null fields with the rest; a JSON string is parsed later
    # and keeps them.
    message = without_nulls(raw)
    # OpenAI's older name for a tool's answer.
    role = "tool" if message.get("role") == "function" else message.get("role")
    message["role"] = role
    if role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}.")
    where = f"{where} ({role})"
    message["content"], thought = text_and_thought(message.get("content", ""), where)
    if thought.strip():
        _take_thought(message, thought, where)
    if "function_call" in message:
        _modernise_call(message, where)
    if "tool_calls" in message:
        _take_calls(message, where)
    _take_loss_mask(message, where)
    return message


def _take_thought(message: dict[str, Any], thought: str, where: str) -> None:
    """Put the thought that parts of the content held into the reasoning field."""
    if message["role"] != "assistant":
        raise RowError(
            f"{where}: content has a part that is a thought, and only the assistant thinks."
        )
    given = message.setdefault("reasoning_content", thought)
    if not isinstance(given, str) or given.strip() != thought.strip():
        raise RowError(f"{where}: reasoning_content and a part of the content differ: keep one.")


def _modernise_call(message: dict[str, Any], where: str) -> None:
    """`function_call`, one call in the older form of OpenAI's, becomes `tool_calls`."""
    call = message.pop("function_call")
    if not isinstance(call, dict):
        raise RowError(f"{where}: 'function_call' is {type(call).__name__}, not a call.")
    if not call:
        return
    if message.get("tool_calls"):
        raise RowError(f"{where}: it has 'function_call' and 'tool_calls': keep one of them.")
    message["tool_calls"] = [{"type": "function", "function": call}]


def _take_calls(message: dict[str, Any], where: str) -> None:
    """Check and convert `tool_calls`; an empty list goes."""
    calls = message.pop("tool_calls")
    if not isinstance(calls, list):
        raise RowError(
            f"{where}: 'tool_calls' is {type(calls).__name__}, not a list: store it as a list, or "
            "decode it in a function of yours (data.custom_cls.path, name)."
        )
    if not calls:
        return
    if message["role"] != "assistant":
        raise RowError(f"{where}: only the assistant makes tool calls.")
    message["tool_calls"] = [
        _tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls)
    ]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    body = call.get("function", call) if isinstance(call, dict) else None
    name = body.get("name") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(name, str) or not name:
        raise RowError(f"{where}: it has no function name.")
    arguments = _arguments(body.get("arguments", {}), name, where)
    converted = {"type": call.get("type", "function")}
    for key, value in call.items():
        if key not in ("function", "name", "arguments", "type"):
            converted[key] = value
    converted["function"] = {"name": name, "arguments": arguments}
    return converted


def _arguments(given: Any, name: str, where: str) -> dict[str, Any]:
    """The arguments of a call, given as an object or as its JSON text."""
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given) if given.strip() else {}
        except json.JSONDecodeError as error:
            raise RowError(
                f"{where}: the arguments of {name!r} can't be parsed: {error.msg} at character "
                f"{error.pos}."
            ) from error
        except ValueError as error:  # a number of more digits than Python reads
            raise RowError(
                f"{where}: the arguments of {name!r} can't be parsed: {error}."
            ) from error
    if not isinstance(arguments, dict):
        raise RowError(
            f"{where}: the arguments of {name!r} are a {type(arguments).__name__}, not an object."
        )
    try:
        json.dumps(arguments, allow_nan=False)
    except TypeError as error:
        raise RowError(
            f"{where}: the arguments of {name!r} can't be written as JSON: {error}."
        ) from error
    except ValueError as error:
        raise RowError(
            f"{where}: the arguments of {name!r} hold NaN or an infinite number, and JSON has neither."
        ) from error
    return arguments


def _take_loss_mask(message: dict[str, Any], where: str) -> None:
    """What says whether a message is trained becomes `loss_mask`: 0 or 1."""
    given: dict[str, int] = {}
    for key in (*WEIGHTS, *SWITCHES):
        if key not in message or (key in SWITCHES and not isinstance(message[key], bool)):
            continue
        value = _loss_mask(message.pop(key), key, message["role"], where)
        if value is not None:
            given[key] = value
    if len({*given.values()}) > 1:
        raise RowError(
            f"{where}: {' and '.join(given)} say the opposite of each other: keep one of them."
        )
    if given:
        message["loss_mask"] = next(iter(given.values()))


def _loss_mask(value: Any, key: str, role: str, where: str) -> int | None:
    """Whether a message is trained; None where nothing is said."""
    if isinstance(value, float) and math.isnan(value):  # pandas writes an absent integer so
        return None
    if value not in (0, 1):
        raise RowError(f"{where}: {key} is {value!r}; it is 0 or 1.")
    if value == 1 and role != "assistant":
        raise RowError(f"{where}: {key} is 1, but only what the assistant wrote can be trained.")
    return int(value)
