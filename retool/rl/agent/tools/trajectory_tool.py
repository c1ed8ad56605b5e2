"""A user's object with a state per trajectory, as a tool."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from retool.rl.agent.tools.function import text_of
from retool.rl.agent.tools.on_thread import call_anywhere
from retool.rl.agent.tools.protocol import ToolResult, check_schema, function_of
from retool.rl.reward.foreign import plain, shown


@runtime_checkable
class KeepsState(Protocol):
    """What a user writes: three methods, sync or async, and a `schema`, unless a file gives one.

    `open(row)` returns a state: anything. `call(state, arguments)` returns what the model reads, or
    (that, reward, done): the turn's reward or None, and whether the trajectory is over.
    `close(state)` returns nothing, or a number: what the tool gives for the whole answer.
    """

    def open(self, row: Mapping[str, Any], /) -> Any: ...

    def call(self, state: Any, arguments: Mapping[str, Any], /) -> Any: ...

    def close(self, state: Any, /) -> Any: ...


class TrajectoryTool:
    """A `StatefulTool` (see there) made of an object that `KeepsState`.

    A sync method runs on a thread of its own. One that is given up goes on there, so a state may be
    closed while a call is still at it.
    """

    def __init__(self, made: KeepsState, schema: Mapping[str, Any] | None = None) -> None:
        """ValueError without a schema, or with one that names another tool."""
        self.made = made
        found = schema if schema is not None else getattr(made, "schema", None)
        self.name = str(getattr(made, "name", None) or function_of(found)["name"])
        check_schema(self.name, found)
        self.schema = dict(found or {})

    async def open_state(self, row: Mapping[str, Any]) -> Any:
        return await call_anywhere(self.made.open, row, orphaned=self._close_orphan)

    async def call_state(self, state: Any, arguments: Mapping[str, Any]) -> ToolResult:
        return result_of(await call_anywhere(self.made.call, state, arguments))

    async def close_state(self, state: Any) -> float | None:
        return await call_anywhere(self.made.close, state)

    async def close(self) -> None:
        """There is nothing to end: its states are closed with their trajectories."""

    def _close_orphan(self, state: Any) -> None:
        """A state that came too late, on a thread where no event loop runs."""
        closed = self.made.close(state)
        if inspect.isawaitable(closed):
            asyncio.run(_awaited(closed))


async def _awaited(value: Any) -> Any:
    return await value


def result_of(value: Any) -> ToolResult:
    """What a call returned, as a result. TypeError for a tuple of another form."""
    if isinstance(value, ToolResult):
        return value
    if not isinstance(value, tuple):
        return ToolResult(text_of(value), "success")
    if len(value) != 3:
        raise TypeError(
            f"a call returned a tuple of {len(value)}: return text, or (text, reward, done)"
        )
    text, reward, done = value
    given = None if reward is None else float(reward)
    over = plain(done)
    if over is not None and not isinstance(over, (bool, int, float)):
        raise TypeError(f"a call returned done={shown(done)}: give true or false")
    return ToolResult(text_of(text), "success", reward=given, done=bool(over))
