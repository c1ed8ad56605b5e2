"""The tools of a run: loaded from the file that names them, and closed at the end.

The file has the form that existing recipes use; their class names are accepted, and mean the code
interpreter here.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retool.rl.agent.tools.given import as_tool, made_of, named_object
from retool.rl.agent.tools.interpreter import SCHEMA, CodeInterpreter, InterpreterConfig
from retool.rl.agent.tools.mcp import mcp_tools, read_server
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.agent.tools.session import SESSION_SCHEMA, InterpreterSession
from retool.rl.agent.tools.state import outcome_of
from retool.rl.agent.tools.verl.modules import verl_importable
from retool.rl.reward.source import OF_PROGRAM

# What `class_name` may say for the code interpreter: our own name first
INTERPRETERS = (
    "retool.rl.agent.tools.CodeInterpreter",
    "verl.tools.sandbox_fusion_tools.SandboxFusionTool",
    "recipe.retool.retool.CustomSandboxFusionTool",
)
CODE_INTERPRETER = SCHEMA["function"]["name"]
CLOSE_SECONDS = 30.0  # that a tool has to close


@dataclass(frozen=True)
class RunLimits:
    """What the run's own configuration says about programs, above what a tool's says.

    `workers` of them at once (None: as the tool says), none longer than `longest` seconds, in
    `isolation` ("auto": as the tool says); `session`: variables live on between calls.
    """

    workers: int | None = None
    longest: float = math.inf
    isolation: str = "auto"
    session: bool = False

    def over(self, config: InterpreterConfig) -> InterpreterConfig:
        return replace(
            config,
            workers=self.workers or config.workers,
            default_timeout=min(config.default_timeout, self.longest),
            isolation=config.isolation if self.isolation == "auto" else self.isolation,
            session=config.session or self.session,
        )


NO_LIMITS = RunLimits()


def load_tools(
    path: str | Path | None, limits: RunLimits = NO_LIMITS, names: Sequence[str] = ()
) -> list[AnyTool]:
    """The tools of a config file and those of `names` (see `_named_tool`), started; without any, the
    code interpreter on this machine. `path` may be a name, too.

    ValueError names the file, the entry and the key at fault.
    """
    if path == OF_PROGRAM:
        raise ValueError(
            "the run was started by a program that gave its own tools, which are in no file. Start it "
            "from there, or give a file of tools."
        )
    # multi_turn.enable alone means the code interpreter.
    if path is None and not names:
        names = [CODE_INTERPRETER]
    if path is not None and ".py/" in str(path):
        names = [str(path), *names]
        path = None
    entries = [] if path is None else _read_entries(path)
    tools: list[AnyTool] = []
    for index, entry in enumerate(entries):
        where = f"{path}: tools[{index}]"
        if isinstance(entry, dict) and "mcp" in entry:
            tools += _load_server(entry["mcp"], where)
        else:
            tools.append(_load_entry(entry, where, limits))
    tools += [_named_tool(name, limits) for name in names]
    _check_names(tools, "" if path is None else f"{path}: ")
    return tools


def _interpreter(config: InterpreterConfig, schema: dict[str, Any] | None = None) -> AnyTool:
    if config.session:
        return InterpreterSession(CodeInterpreter(config, schema or SESSION_SCHEMA))
    return CodeInterpreter(config, schema)


def _named_tool(name: str, limits: RunLimits) -> AnyTool:
    """Our own by its name; a function, an object, or one of a class that needs no arguments, at
    `file.py/name` or a dotted path.
    """
    if name == CODE_INTERPRETER:
        return _interpreter(limits.over(InterpreterConfig()))
    with verl_importable():
        found = named_object(name)
    try:
        return made_of(found, name, {}, None) if isinstance(found, type) else as_tool(found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def make_tools(given: Sequence[Any], limits: RunLimits = NO_LIMITS) -> list[AnyTool]:
    """The tools that a program gives: functions, objects (see `as_tool`), and our own by its name,
    "code_interpreter". ValueError for anything else.
    """
    tools: list[AnyTool] = []
    for entry in given:
        if isinstance(entry, str) and entry == CODE_INTERPRETER:
            tools.append(_interpreter(limits.over(InterpreterConfig())))
        else:
            tools.append(as_tool(entry))
    _check_names(tools, "")
    return tools


def _check_names(tools: Sequence[AnyTool], where: str) -> None:
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


def _load_server(given: Any, where: str) -> list[AnyTool]:
    """The tools of an MCP server."""
    try:
        return mcp_tools(read_server(given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _load_entry(entry: Any, where: str, limits: RunLimits) -> AnyTool:
    """The tool that one entry names; `where` is how a fault calls that entry."""
    name = None
    if isinstance(entry, dict):
        name = entry.get("class_name") or entry.get("function")
    if not isinstance(entry, dict) or not isinstance(name, str):
        raise ValueError(
            f"{where}: expected a mapping with a class_name, such as {INTERPRETERS[0]}, or with a "
            "function, such as file.py/name."
        )
    config = entry.get("config") or {}
    schema = entry.get("tool_schema")
    try:
        if not isinstance(config, dict):
            raise ValueError(f"config is a {type(config).__name__}, not a mapping.")
        # verl's configurations name verl's class. Ours does the same, so they run as they are.
        if name in INTERPRETERS:
            return _interpreter(limits.over(interpreter_config(config)), schema)
        with verl_importable():
            found = named_object(name)
            if "function" in entry:
                return as_tool(found, schema)
            if not callable(found):
                raise ValueError(f"{name} is a {type(found).__name__}, not a class.")
            return made_of(found, name, config, schema)
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


async def close_tools(tools: Iterable[AnyTool]) -> None:
    """Let every tool go.

    One that raises, or takes longer than `CLOSE_SECONDS`, is told of and left to itself: the run's
    work is done.
    """
    for tool in tools:
        # Not `wait_for`, which waits for one that doesn't heed being cancelled
        outcome = await outcome_of(_close(tool), CLOSE_SECONDS)
        reason = f"it took longer than {CLOSE_SECONDS:g} s"
        if outcome is not None:
            if outcome.error is None:
                continue
            reason = outcome.reason
        warnings.warn(f"the tool {tool.name} did not close: {reason}", stacklevel=1)


async def _close(tool: AnyTool) -> None:
    await tool.close()
