"""The tools of a run: the config file that names them, loaded, and closed at the end.

The file has the form that existing recipes use; their class names are accepted, and mean the code
interpreter here.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retool.rl.agent.tools.function import FunctionTool
from retool.rl.agent.tools.interpreter import SCHEMA, CodeInterpreter, InterpreterConfig
from retool.rl.agent.tools.protocol import Tool, check_schema
from retool.rl.reward.source import OF_PROGRAM

# What `class_name` may say for the code interpreter: our own name first
INTERPRETERS = (
    "retool.rl.agent.tools.CodeInterpreter",
    "verl.tools.sandbox_fusion_tools.SandboxFusionTool",
    "recipe.retool.retool.CustomSandboxFusionTool",
)
CLOSE_SECONDS = 30.0  # that a tool has to close


@dataclass(frozen=True)
class RunLimits:
    """What the run's own configuration says about programs, above what a tool's says.

    `workers` of them at once (None: as the tool says), none longer than `longest` seconds, in
    `isolation` ("auto": as the tool says).
    """

    workers: int | None = None
    longest: float = math.inf
    isolation: str = "auto"

    def over(self, config: InterpreterConfig) -> InterpreterConfig:
        return replace(
            config,
            workers=self.workers or config.workers,
            default_timeout=min(config.default_timeout, self.longest),
            isolation=config.isolation if self.isolation == "auto" else self.isolation,
        )


NO_LIMITS = RunLimits()


def load_tools(path: str | Path | None, limits: RunLimits = NO_LIMITS) -> list[Tool]:
    """The tools of a config file, started; without a file, the code interpreter on this machine.

    ValueError names the file, the entry and the key at fault.
    """
    if path == OF_PROGRAM:
        raise ValueError(
            "the run was started by a program that gave its own tools, which are in no file. Start it "
            "from there, or give a file of tools."
        )
    if path is None:
        return [CodeInterpreter(limits.over(InterpreterConfig()))]
    tools = [
        _load_entry(entry, f"{path}: tools[{index}]", limits)
        for index, entry in enumerate(_read_entries(path))
    ]
    _check_names(tools, f"{path}: ")
    return tools


def make_tools(given: Sequence[Any], limits: RunLimits = NO_LIMITS) -> list[Tool]:
    """The tools that a program gives: functions, objects with what a `Tool` has, and our own by its
    name, "code_interpreter". ValueError for anything else.
    """
    tools: list[Tool] = []
    for entry in given:
        if entry == SCHEMA["function"]["name"]:
            tools.append(CodeInterpreter(limits.over(InterpreterConfig())))
        elif isinstance(entry, Tool):
            check_schema(entry.name, entry.schema)
            tools.append(entry)
        elif callable(entry):
            tools.append(FunctionTool(entry))
        else:
            raise ValueError(
                f"{entry!r:.80} is no tool: give a function, an object with name, schema, call and "
                "close (retool.rl.agent.tools.Tool), or 'code_interpreter'."
            )
    _check_names(tools, "")
    return tools


def _check_names(tools: Sequence[Tool], where: str) -> None:
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError(f"{where}tool names must differ, got {names}.")


def _read_entries(path: str | Path) -> list[Any]:
    """What stands under `tools` in a config file."""
    if not Path(path).is_file():
        raise ValueError(f"tool config file {path} doesn't exist.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} can't be read as YAML: {reason}.") from error
    entries = content.get("tools") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list under the key 'tools'.")
    return entries


def _load_entry(entry: Any, where: str, limits: RunLimits) -> Tool:
    """The tool that one entry names; `where` is how a fault calls that entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise ValueError(
            f"{where}: expected a mapping with a class_name, such as {INTERPRETERS[0]}."
        )
    class_name = entry["class_name"]
    config = entry.get("config") or {}
    schema = entry.get("tool_schema")
    try:
        if not isinstance(config, dict):
            raise ValueError(f"config is a {type(config).__name__}, not a mapping.")
        if class_name in INTERPRETERS:
            return CodeInterpreter(limits.over(interpreter_config(config)), schema)
        return _make_custom(class_name, config, schema)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def interpreter_config(config: Mapping[str, Any]) -> InterpreterConfig:
    """The code interpreter's `config`, typed; an unknown key is named with its nearest neighbour."""
    known = [field.name for field in fields(InterpreterConfig)]
    for key in config:
        if key in known:
            continue
        nearest = difflib.get_close_matches(str(key), known, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown config key {key!r}{hint} Known: {', '.join(known)}.")
    return InterpreterConfig(**{str(key): value for key, value in config.items()})


def _make_custom(path: str, config: Mapping[str, Any], schema: Any) -> Tool:
    """A tool of the user's: what is at the dotted `path` is called with its config and schema.

    ValueError where that can't be done, or gives no `Tool`.
    """
    module, _, name = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise ValueError(
            f"class_name={path} can't be imported ({type(error).__name__}: {error}). "
            f"The code interpreter's is {INTERPRETERS[0]}."
        ) from error
    try:
        tool = make(config, schema)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{path} can't be made with its config and tool_schema "
            f"({type(error).__name__}: {error})."
        ) from error
    missing = [part for part in ("name", "schema", "call", "close") if not hasattr(tool, part)]
    if missing:
        raise ValueError(
            f"{path} makes a {type(tool).__name__} without {', '.join(missing)}: see "
            "retool.rl.agent.tools.Tool."
        )
    # A decorated function tells what it wraps; whether that awaits is the decorator's affair
    if not (inspect.iscoroutinefunction(tool.call) or hasattr(tool.call, "__wrapped__")):
        raise ValueError(
            f"{path}.call isn't a coroutine function: write 'async def call', and await in it what "
            "takes time."
        )
    check_schema(tool.name, tool.schema)
    return tool


async def close_tools(tools: Iterable[Tool]) -> None:
    """Let every tool go.

    One that raises, or takes longer than `CLOSE_SECONDS`, is told of and left to itself: the run's
    work is done.
    """
    for tool in tools:
        try:
            await asyncio.wait_for(tool.close(), CLOSE_SECONDS)
        except Exception as error:  # whatever a user's tool raises
            warnings.warn(
                f"the tool {tool.name} did not close: {type(error).__name__}: {error}", stacklevel=1
            )
