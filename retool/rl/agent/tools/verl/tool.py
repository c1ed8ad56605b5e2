"""verl's tools, a class with `create`, `execute`, `calc_reward` and `release`, as they are.

An instance is made when an answer first calls the tool, and lives as long as the answer. What
`execute` gives as its reward counts for the turn; what `calc_reward` gives at the end is in
`Trajectory.tool_scores`. Its metrics aren't logged.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from retool.rl.agent.tools.function import text_of
from retool.rl.agent.tools.of_row import kwargs_of
from retool.rl.agent.tools.on_thread import call_anywhere
from retool.rl.agent.tools.protocol import ToolResult, check_schema, function_of

METHODS = ("create", "execute", "calc_reward", "release")


def is_verls(given: Any) -> bool:
    """Whether a class or an object has the methods of verl's tools."""
    return all(callable(getattr(given, method, None)) for method in METHODS)


@dataclass(frozen=True)
class Instance:
    """An answer's instance of the tool, by its name there, and the row's `extra_info`."""

    name: str
    extra_info: Mapping[str, Any]


class VerlTool:
    """A `StatefulTool` made of an object of verl's kind."""

    def __init__(self, made: Any, schema: Mapping[str, Any] | None = None) -> None:
        """ValueError without a schema that can be used."""
        self.made = made
        found = dict(schema) if schema is not None else _own_schema(made)
        self.name = str(function_of(found)["name"])
        check_schema(self.name, found)
        self.schema = found
        self._takes_text = _annotation(made.execute, "parameters") in (str, "str")

    async def open_state(self, row: Mapping[str, Any]) -> Instance:
        extra_info = row.get("extra_info") or {}
        kwargs = kwargs_of(extra_info, self.name, "create_kwargs")
        # Some read each of them by its name, and some all of them under this one
        if _takes(self.made.create, "create_kwargs"):
            kwargs.setdefault("create_kwargs", dict(kwargs))
        name = uuid4().hex
        created = await call_anywhere(partial(self.made.create, name, **kwargs))
        own = created[0] if isinstance(created, tuple) else created
        return Instance(str(own or name), extra_info)

    async def call_state(self, state: Instance, arguments: Mapping[str, Any]) -> ToolResult:
        kwargs = kwargs_of(state.extra_info, self.name, "execute_kwargs")
        given = json.dumps(dict(arguments)) if self._takes_text else dict(arguments)
        answer = await call_anywhere(partial(self.made.execute, state.name, given, **kwargs))
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise TypeError(f"execute gave {answer!r:.80}, not (response, reward, metrics)")
        response, reward, _ = answer
        number = None if reward is None else float(reward)
        return ToolResult(_text_of(response), "success", reward=number)

    async def close_state(self, state: Instance) -> float | None:
        try:
            kwargs = kwargs_of(state.extra_info, self.name, "calc_reward_kwargs")
            return await call_anywhere(partial(self.made.calc_reward, state.name, **kwargs))
        finally:
            kwargs = kwargs_of(state.extra_info, self.name, "release_kwargs")
            await call_anywhere(partial(self.made.release, state.name, **kwargs))

    async def close(self) -> None:
        """There is nothing to end: its instances are released with their answers."""


def _own_schema(made: Any) -> dict[str, Any]:
    """What the object says of itself."""
    schema: Any = None
    if hasattr(made, "get_openai_tool_schema"):
        schema = made.get_openai_tool_schema()
    if schema is None:
        schema = getattr(made, "tool_schema", None)
    if hasattr(schema, "model_dump"):
        schema = schema.model_dump(exclude_unset=True, exclude_none=True)
    return schema  # whatever it is: it is checked


def _text_of(response: Any) -> str:
    """What the model reads of a response: text, or an object or a mapping that has one.

    ValueError for images and videos, which no model here reads.
    """
    if isinstance(response, str):
        return response
    parts = response if isinstance(response, Mapping) else vars(response)
    for kind in ("image", "video"):
        if parts.get(kind):
            raise ValueError(f"it answered with {kind}s, which no model here reads.")
    return text_of(parts.get("text") or "")


def _annotation(function: Any, parameter: str) -> Any:
    try:
        return inspect.signature(function).parameters[parameter].annotation
    except (KeyError, TypeError, ValueError):
        return None


def _takes(function: Any, name: str) -> bool:
    """Whether it can be given an argument by that name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
