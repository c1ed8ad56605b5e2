"""Whatever a user gave as a tool, recognised by its attributes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from retool.data.read.user_function import load_object
from retool.rl.agent.tools.function import FunctionTool
from retool.rl.agent.tools.protocol import AnyTool, check_schema, keeps_state
from retool.rl.agent.tools.trajectory_tool import TrajectoryTool
from retool.rl.agent.tools.verl.modules import schema_for_verl
from retool.rl.agent.tools.verl.tool import VerlTool, is_verls

A_TOOL = (
    "give a function with type hints, an object with open, call and close for each trajectory, or one "
    "with name, schema, call and close (retool.rl.agent.tools.Tool)"
)


def as_tool(given: Any, schema: Mapping[str, Any] | None = None) -> AnyTool:
    """A function, or an object with a tool's methods, as a tool. `schema` goes before its own.

    ValueError for anything else.
    """
    if _has(given, "open", "call", "close"):
        return TrajectoryTool(given, schema)
    if is_verls(given):
        return VerlTool(given, schema)
    if _has(given, "call") or keeps_state(given):
        _check_parts(given)
        return given
    if callable(given) and not isinstance(given, type):
        return FunctionTool(given, schema)
    raise ValueError(f"{given!r:.80} is no tool: {A_TOOL}, or 'code_interpreter'.")


def _has(given: Any, *methods: str) -> bool:
    return all(callable(getattr(given, method, None)) for method in methods)


def _check_parts(tool: Any) -> None:
    """ValueError for a `Tool` without all of its parts, or that doesn't await."""
    kind = type(tool).__name__
    parts = ("name", "schema", "close")
    missing = [part for part in parts if not hasattr(tool, part)]
    if missing:
        raise ValueError(f"a {kind} without {', '.join(missing)} is no tool: {A_TOOL}.")
    check_schema(tool.name, tool.schema)
    if keeps_state(tool):
        return
    # A decorated function tells what it wraps; whether that awaits is the decorator's affair
    if not (inspect.iscoroutinefunction(tool.call) or hasattr(tool.call, "__wrapped__")):
        raise ValueError(
            f"{kind}.call isn't a coroutine function: write 'async def call', and await in it what "
            "takes time."
        )


def named_object(name: str) -> Any:
    """What is at `file.py/name`, or at a dotted path that Python can import. ValueError where there
    is nothing.
    """
    path, _, own = name.rpartition("/")
    if path.endswith(".py"):
        return load_object(path, own)
    module, _, own = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), own)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(
            f"the tool {name} can't be imported ({type(error).__name__}: {error}). Name a class or a function "
            "as package.module.name, or as file.py/name."
        ) from error


def made_of(make: Callable[..., Any], name: str, config: Mapping[str, Any], schema: Any) -> AnyTool:
    """The tool that `make`, which is called `name`, gives: it is called with config and schema, or
    with the config's keys where these are what it asks for.

    ValueError where that can't be done, or gives no tool.
    """
    try:
        if is_verls(make):
            made = make(config, schema_for_verl(schema))
        elif config and _binds(make, **config):
            made = make(**config)
        elif _binds(make, config, schema):
            made = make(config, schema)
        else:
            made = make(**config)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ValueError(
            f"{name} can't be made with its config and tool_schema "
            f"({type(error).__name__}: {error})."
        ) from error
    try:
        return as_tool(made, schema)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _binds(make: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    try:
        inspect.signature(make).bind(*arguments, **named)
    except (TypeError, ValueError):
        return False
    return True
