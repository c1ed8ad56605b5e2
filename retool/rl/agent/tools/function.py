"""A Python function as a tool."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from typing import Any

from retool.data.tool_schema import schema_of
from retool.rl.agent.tools.on_thread import on_thread
from retool.rl.agent.tools.protocol import ToolResult, check_schema, function_of

MAX_PIECES_CHARACTERS = 1_000_000  # of what a generator gives; what is beyond isn't asked for


class FunctionTool:
    """A function that the model may call: its type hints and docstring are the schema, unless one is
    given.

    It runs on a thread of its own for each call, so several calls may be in it at once; an `async`
    one is awaited. What it returns is shown to the model, as text or as JSON; what it raises, too.
    What a generator yields, sync or async, is shown line by line.
    """

    def __init__(
        self, function: Callable[..., Any], schema: Mapping[str, Any] | None = None
    ) -> None:
        """ValueError for a function without a schema."""
        self.function = function
        self.schema = dict(schema) if schema is not None else schema_of(function)
        self.name = str(function_of(self.schema)["name"])
        check_schema(self.name, self.schema)

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """`arguments` are those the model wrote, parsed; wrong ones are answered."""
        try:
            # Before the call: a TypeError out of the function itself must not be told as wrong
            # arguments.
            inspect.signature(self.function).bind(**arguments)
        except TypeError as error:
            return ToolResult(f"ArgumentError: {self.name}: {error}.", "bad_arguments")
        value = await self._returned(arguments)
        return value if isinstance(value, ToolResult) else ToolResult(text_of(value), "success")

    async def _returned(self, arguments: Mapping[str, Any]) -> Any:
        function = self.function
        if inspect.iscoroutinefunction(function):
            return await function(**arguments)
        if inspect.isasyncgenfunction(function):
            return await _async_lines(function(**arguments))
        # What a decorated function gives is known once it gives it
        # On a thread: a plain function may block, and one event loop serves all trajectories.
        value = await on_thread(partial(_called, function, arguments))
        if inspect.isasyncgen(value):
            return await _async_lines(value)
        return await value if inspect.isawaitable(value) else value

    async def close(self) -> None:
        """There is nothing to end."""


def _called(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    value = function(**arguments)
    # Here, as a generator's code runs while it is read: on the thread, not on the event loop.
    return _lines(value) if inspect.isgenerator(value) else value


def _lines(pieces: Iterator[Any]) -> str:
    lines = list[str]()
    characters = 0
    for piece in pieces:
        lines.append(text_of(piece))
        characters += len(lines[-1])
        if characters > MAX_PIECES_CHARACTERS:
            break
    return "\n".join(lines)


async def _async_lines(pieces: AsyncIterator[Any]) -> str:
    lines = list[str]()
    characters = 0
    async for piece in pieces:
        lines.append(text_of(piece))
        characters += len(lines[-1])
        if characters > MAX_PIECES_CHARACTERS:
            break
    return "\n".join(lines)


def text_of(value: Any) -> str:
    """What a function returned, as the model reads it: text, bytes as text, anything else as JSON, or
    as Python shows it where JSON has no words for it.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # what programs print, say
        return value.decode("utf-8", "replace")
    try:
        return json.dumps(value, ensure_ascii=False, default=_in_json)
    except (TypeError, ValueError):  # keys that aren't text, or a list that holds itself
        return str(value)


def _in_json(value: Any) -> Any:
    """Arrays and numbers of numpy's and torch's as lists and numbers, anything else as text."""
    of_library = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
    # Not whatever has `tolist`: a series of pandas' would lose its labels
    return value.tolist() if of_library & {"numpy", "torch"} else str(value)
