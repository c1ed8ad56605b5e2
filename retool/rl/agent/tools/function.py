"""A Python function as a tool."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from retool.data.tool_schema import schema_of
from retool.rl.agent.tools.protocol import ToolResult, check_schema, function_of


class FunctionTool:
    """A function that the model may call: its type hints and docstring are the schema, unless one is
    given.

    It runs on a thread of its own for each call, so several calls may be in it at once; an `async`
    one is awaited. What it returns is shown to the model, as text or as JSON; what it raises, too.
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
            inspect.signature(self.function).bind(**arguments)
        except TypeError as error:
            return ToolResult(f"ArgumentError: {self.name}: {error}.", "bad_arguments")
        if inspect.iscoroutinefunction(self.function):
            value = await self.function(**arguments)
        else:
            value = await _on_thread(lambda: self.function(**arguments))
        return value if isinstance(value, ToolResult) else ToolResult(text_of(value), "success")

    async def close(self) -> None:
        """There is nothing to end."""


def text_of(value: Any) -> str:
    """What a function returned, as the model reads it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


async def _on_thread(call: Callable[[], Any]) -> Any:
    """`call()`, on a thread that ends with the program: a call may hang."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(value)
        elif isinstance(error, StopIteration):  # which a future can't hold
            answer.set_exception(RuntimeError("StopIteration"))
        else:
            answer.set_exception(error)

    def work() -> None:
        value = None
        failure: BaseException | None = None
        try:
            value = call()
        except BaseException as error:
            failure = error
        if not loop.is_closed():  # nobody waits any more
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, name="retool-tool", daemon=True).start()
    return await answer
