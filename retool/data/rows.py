"""From a raw row to a checked `Conversation`: containers converted, absent fields dropped, every doubt an error that names the row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .files import RowError, columns_of
from .parts import text_and_thought
from .quoting import Masks

AS_LIST = "store it as a list, or decode it in a function of yours (data.custom_cls.path, name)"  # of messages found as text
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """One checked row: plain Python containers only, no null field, `arguments` parsed, `content` always text.

    `loss_mask` of a message is 0 or 1 where it was given. `file` and `row` say where it is from, for error texts. `masks`: the
    control tokens in its texts are hidden in this way (see `quoting`).
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


@dataclass(frozen=True)
class RowFormat:
    """Which columns make a conversation: a list of messages, or (`multiturn` false) a prompt and its response."""

    multiturn: bool = True
    messages_key: str = "messages"
    tools_key: str = "tools"
    enable_thinking_key: str = "enable_thinking"
    prompt_key: str = "prompt"
    response_key: str = "response"

    @property
    def required(self) -> tuple[str, ...]:
        return (self.messages_key,) if self.multiturn else (self.prompt_key, self.response_key)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.required, self.tools_key, self.enable_thinking_key)

    def check(self, file: str) -> None:
        """Raises ValueError when a column is missing. An optional one is only missed when it was named on purpose."""
        there = columns_of(file)
        optional = [key for key in (self.tools_key, self.enable_thinking_key) if key not in ("tools", "enable_thinking")]
        for column in [*self.required, *optional]:
            if column not in there:
                raise ValueError(f"{file} has no column {column!r}; it has {', '.join(there)}. {self._way_out(column)}")

    def _way_out(self, column: str) -> str:
        keys = {
            self.messages_key: "data.multiturn.messages_key", self.tools_key: "data.multiturn.tools_key",
            self.enable_thinking_key: "data.multiturn.enable_thinking_key",
            self.prompt_key: "data.prompt_key", self.response_key: "data.response_key",
        }  # fmt: skip
        return f"Name the right one with {keys[column]}."


def plain(value: Any) -> Any:
    """numpy and Arrow containers and scalars, tuples and mappings, recursively, as dict, list and Python scalars."""
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        value = value.to_pylist()
    elif isinstance(value, pa.Scalar):
        value = value.as_py()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def without_nulls(value: Any) -> Any:
    """Drop null fields of mappings, recursively: that is how parquet stores a field that only other rows have.

    Nulls that are elements of a list stay. To keep a null field of `arguments` or `tools`, write them as a JSON string.
    """
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def to_conversation(
    row: Mapping[str, Any], file: str, index: int, form: RowFormat | None = None, prompt_only: bool = False
) -> Conversation:
    """Check and convert one raw row. `prompt_only` allows rows without an assistant turn (RL prompts).

    Raises RowError naming file, row and message for anything that isn't exactly what it should be.
    """
    form = form or RowFormat()
    missing = [key for key in form.required if key not in row]
    where = f"{file}, row {index}"
    if missing:
        raise RowError(f"{where}: there is no {missing[0]!r}; it has {', '.join(map(str, row)) or 'nothing'}.")
    raw = plain(row[form.messages_key]) if form.multiturn else _single_turn(row, form, where)
    if not isinstance(raw, list) or not raw or not all(isinstance(message, dict) for message in raw):
        found = f"a list of {type(raw[0]).__name__}" if isinstance(raw, list) and raw else "empty" if raw == [] else type(raw).__name__
        way_out = f": {AS_LIST}" if isinstance(raw, str) else ""
        key = form.messages_key if form.multiturn else form.prompt_key
        raise RowError(f"{where}: {key!r} isn't a list of messages ({found}){way_out}.")
    messages = [_message(message, f"{where}, message {i}") for i, message in enumerate(raw)]
    _check_order(messages, where, prompt_only)
    thinking = plain(row.get(form.enable_thinking_key))
    if thinking is not None and not isinstance(thinking, bool):
        raise RowError(f"{where}: {form.enable_thinking_key!r} is {thinking!r}, not true or false.")
    return Conversation(messages, _tools(plain(row.get(form.tools_key)), form.tools_key, where), thinking, file, index)


def _single_turn(row: Mapping[str, Any], form: RowFormat, where: str) -> Any:
    prompt, response = plain(row[form.prompt_key]), plain(row[form.response_key])
    if not isinstance(response, str):
        raise RowError(f"{where}: {form.response_key!r} is {type(response).__name__}, not text.")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return [*prompt, {"role": "assistant", "content": response}] if isinstance(prompt, list) else prompt


def _check_order(messages: Sequence[dict[str, Any]], where: str, prompt_only: bool) -> None:
    first = next((m["role"] for m in messages if m["role"] not in ("system", "developer")), None)
    if first == "assistant":
        raise RowError(f"{where}: the first turn is the assistant's; it has nothing to answer. Begin with a user message.")
    if not prompt_only and not any(m["role"] == "assistant" for m in messages):
        raise RowError(f"{where}: there is no assistant turn, so nothing to train.")


def _message(raw: dict[str, Any], where: str) -> dict[str, Any]:
    # `arguments` given as a dict loses its null fields with the rest; a JSON string is parsed later and keeps them.
    message = without_nulls(raw)
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}.")
    where = f"{where} ({role})"
    message["content"], thought = text_and_thought(message.get("content", ""), where)
    if thought.strip():
        _take_thought(message, thought, where)
    if "tool_calls" in message:
        calls = message.pop("tool_calls")
        if not isinstance(calls, list):
            raise RowError(f"{where}: 'tool_calls' is {type(calls).__name__}, not a list.")
        if calls and role != "assistant":
            raise RowError(f"{where}: only the assistant makes tool calls.")
        if calls:
            message["tool_calls"] = [_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls)]
    if "loss_mask" in message:
        _normalise_loss_mask(message, role, where)
    return message


def _take_thought(message: dict[str, Any], thought: str, where: str) -> None:
    """Note what the parts of the content say was thought, as the reasoning field does."""
    if message["role"] != "assistant":
        raise RowError(f"{where}: content has a part that is a thought, and only the assistant thinks.")
    given = message.setdefault("reasoning_content", thought)
    if not isinstance(given, str) or given.strip() != thought.strip():
        raise RowError(f"{where}: reasoning_content and a part of the content differ: keep one.")


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    body = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str) or not body["name"]:
        raise RowError(f"{where}: it has no function name.")
    arguments = body.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise RowError(f"{where}: the arguments of {body['name']!r} can't be parsed: {error.msg} at character {error.pos}.") from error
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: the arguments of {body['name']!r} are a {type(arguments).__name__}, not an object.")
    extra = {key: value for key, value in call.items() if key not in ("function", "name", "arguments", "type")}
    return {"type": call.get("type", "function"), **extra, "function": {"name": body["name"], "arguments": arguments}}


def _normalise_loss_mask(message: dict[str, Any], role: str, where: str) -> None:
    value = message["loss_mask"]
    if isinstance(value, float) and math.isnan(value):  # pandas writes an absent integer so
        del message["loss_mask"]
        return
    if value not in (0, 1):
        raise RowError(f"{where}: loss_mask is {value!r}; it is 0 or 1.")
    if value == 1 and role != "assistant":
        raise RowError(f"{where}: loss_mask is 1, but only what the assistant wrote can be trained.")
    message["loss_mask"] = int(value)


def _tools(raw: Any, key: str, where: str) -> list[dict[str, Any]] | None:
    if isinstance(raw, str):
        try:
            tools = json.loads(raw) if raw.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f"{where}: {key!r} is text but not JSON: {error.msg} at character {error.pos}.") from error
    else:
        tools = without_nulls(raw)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise RowError(f"{where}: {key!r} is a {type(tools).__name__}, not a list of function schemas.")
    for i, tool in enumerate(tools):
        body = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(body, dict) or not isinstance(body.get("name"), str):
            raise RowError(f"{where}: tool {i} of {key!r} isn't a function schema with a name.")
    return tools
