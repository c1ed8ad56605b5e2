"""Tools a model may call: the config file that names them, and the code interpreter.

The file has the form that existing recipes use; class names of theirs are accepted and mean the
code interpreter here.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retool.rl.agent.schema import check_schema, function_of
from retool.rl.agent.tool import Tool, ToolResult
from retool.sandbox import Limits, Result, Sandbox
from retool.sandbox.fusion_client import SandboxFusion

INTERPRETERS = (
    "retool.rl.agent.tools.CodeInterpreter",
    "verl.tools.sandbox_fusion_tools.SandboxFusionTool",
    "recipe.retool.retool.CustomSandboxFusionTool",
)
STDERR_LINES = 12
CLOSING = 30.0  # seconds that a tool has to close
TRIAL = 20.0  # seconds that a program of ours may take before the run
STALLED = 600.0  # seconds without the end of any program, after which a sandbox counts as dead

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "A tool for executing code.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code to execute."}},
            "required": ["code"],
        },
    },
}


@dataclass(frozen=True)
class InterpreterConfig:
    """`config:` of the code interpreter. No `sandbox_fusion_url`: programs run on this machine.

    `num_workers` bounds the programs at once (on this machine the number of cores does, too, unless
    `workers` says how many), `rate_limit` the requests under way at a server, where
    `enable_global_rate_limit`. `default_timeout` in seconds from a program's start,
    `memory_limit_mb` per call. `token` is the server's.
    """

    type: str = "native"
    sandbox_fusion_url: str | None = None
    num_workers: int = 128
    enable_global_rate_limit: bool = True
    rate_limit: int = 128
    default_timeout: float = 30
    default_language: str = "python"
    memory_limit_mb: int = 1024
    isolation: str = "strict"
    token: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.type != "native":
            raise ValueError(f"tool type={self.type!r} isn't known; 'native' is.")
        if self.default_language != "python":
            raise ValueError(
                f"default_language={self.default_language!r} can't be run; 'python' can."
            )
        for name in ("num_workers", "rate_limit", "default_timeout", "memory_limit_mb", "workers"):
            value = getattr(self, name)
            if name == "workers" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}={value!r} must be a number above 0.")


class CodeInterpreter:
    """Runs the `code` argument and tells the model what happened.

    Starts its sandbox at once, so that a fault shows early.

    Programs queue; the sandbox limits each from its start. Only where no program has ended for
    `STALLED` seconds are the ones that wait given up, as infrastructure's failure.
    """

    keeps_time = True

    def __init__(
        self, config: InterpreterConfig | None = None, schema: dict[str, Any] | None = None
    ) -> None:
        self.config = config or InterpreterConfig()
        self.schema = schema or SCHEMA
        self.name = function_of(self.schema)["name"]
        self._argument = _only_argument(self.schema)
        self._backend = _backend(self.config)
        self._ended = 0.0  # when the last call did, on the event loop's clock

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """`arguments` are those the model wrote, parsed; wrong ones are answered, not raised."""
        code = arguments.get(self._argument)
        if not isinstance(code, str):
            given = ", ".join(map(str, arguments)) or "none"
            text = (
                f"ArgumentError: {self.name} needs the argument {self._argument!r}, a string (given: "
                f"{given})."
            )
            return ToolResult(text, "bad_arguments")
        result = await self._run(code)
        return ToolResult(
            result_text(result), result.status, result.execution_time, result.queue_seconds
        )

    async def trial(self) -> str:
        """Run a program of ours: why it doesn't give what it must; "" where it does."""
        try:
            result = await asyncio.wait_for(self._run("print(6 * 7)"), TRIAL)
        except asyncio.TimeoutError:
            return f"no answer within {TRIAL:g} s"
        finally:
            if isinstance(self._backend, SandboxFusion):
                # Its connections are this event loop's; the run has another
                await self._backend.close()
        if result.ok and result.stdout.strip() == "42":
            return ""
        return (
            result.reason or f"print(6 * 7) gives {result_text(result)[:200]!r} ({result.status})"
        )

    async def _run(self, code: str) -> Result:
        loop = asyncio.get_running_loop()
        patience = STALLED + self.config.default_timeout
        work = loop.create_task(self._backend.run(code, timeout=self.config.default_timeout))
        begun = loop.time()
        try:
            while not work.done():
                await asyncio.wait([work], timeout=patience)
                if not work.done() and loop.time() - max(begun, self._ended) >= patience:
                    return Result(
                        "sandbox_error", reason=f"no program has ended for {patience:g} s"
                    )
            self._ended = loop.time()
            return work.result()
        finally:
            work.cancel()

    async def close(self) -> None:
        if isinstance(self._backend, Sandbox):
            self._backend.close()
        else:
            await self._backend.close()


def _backend(config: InterpreterConfig) -> Sandbox | SandboxFusion:
    if config.sandbox_fusion_url:
        most = config.rate_limit if config.enable_global_rate_limit else None
        most = config.num_workers if most is None else min(most, config.num_workers)
        return SandboxFusion(
            config.sandbox_fusion_url,
            most,
            config.default_timeout,
            config.memory_limit_mb,
            token=config.token,
        )
    workers = config.workers or min(config.num_workers, max(4, len(os.sched_getaffinity(0))))
    limits = Limits(wall_seconds=config.default_timeout, memory_mb=config.memory_limit_mb)
    # `isolation` is a text, which was checked when the configuration was read.
    isolation: Any = config.isolation
    return Sandbox(limits, workers, isolation, share=node_of(os.environ))


def node_of(environment: Mapping[str, str]) -> str:
    """A name that all ranks of this run on this node have in common, under which they share one
    sandbox; "" for a process alone.
    """
    ranks = environment.get("LOCAL_WORLD_SIZE") or environment.get("WORLD_SIZE") or "1"
    if ranks == "1":
        return ""
    run = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK")
    return " ".join(environment.get(name, "") for name in run)


def _only_argument(schema: Mapping[str, Any]) -> str:
    parameters = schema["function"].get("parameters") or {}
    names = parameters.get("required") or list(parameters.get("properties") or {})
    if len(names) != 1:
        raise ValueError(
            f"the code interpreter takes one argument, its schema requires {list(names)}."
        )
    return str(names[0])


def result_text(result: Result) -> str:
    """What the model reads: stdout, the last lines of stderr, and what stopped the program, if
    anything did.
    """
    parts = [result.stdout.rstrip("\n")] if result.stdout.strip("\n") else []
    if (left_out := result.stdout_bytes - len(result.stdout.encode("utf-8", "replace"))) > 0:
        parts.append(f"[{left_out} more bytes of output]")
    if result.stderr.strip():
        lines = result.stderr.rstrip("\n").split("\n")
        parts.append(
            "\n".join((["[…]"] if len(lines) > STDERR_LINES else []) + lines[-STDERR_LINES:])
        )
    name = {
        "timeout": "TimeoutError",
        "memory_limit": "MemoryError",
        "output_limit": "OutputLimitError",
        "process_limit": "ProcessLimitError",
        "sandbox_error": "SandboxError",
    }.get(result.status)
    if name is not None:
        parts.append(f"{name}: {result.reason}")
    elif result.status == "error" and not result.stderr.strip():
        parts.append(
            "[the program ended with return code "
            f"{result.return_code}{f', {result.reason}' if result.reason else ''}]"
        )
    return "\n".join(parts) or "[no output]"


def load_tools(
    path: str | Path | None,
    workers: int | None = None,
    longest: float = math.inf,
    isolation: str = "auto",
) -> list[Tool]:
    """The tools of a config file, started; None: the code interpreter on this machine.

    `workers` programs run at once (None: what the file says), none longer than `longest` seconds,
    in `isolation` ("auto": what the file says). `ValueError` names the file, the entry and the key
    at fault.
    """
    if path is None:
        return [CodeInterpreter(_limited(InterpreterConfig(), workers, longest, isolation))]
    if not Path(path).is_file():
        raise ValueError(f"tool config file {path} doesn't exist.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} can't be read as YAML: {' '.join(str(error).split())}."
        ) from error
    entries = content.get("tools") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list under the key 'tools'.")
    tools = [
        _load(entry, f"{path}: tools[{index}]", workers, longest, isolation)
        for index, entry in enumerate(entries)
    ]
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: tool names must differ, got {names}.")
    return tools


async def close_tools(tools: Iterable[Tool]) -> None:
    """Let every tool go.

    One that raises, or takes longer than `CLOSING`, is told of and left to itself: the run's work
    is done.
    """
    for tool in tools:
        try:
            await asyncio.wait_for(tool.close(), CLOSING)
        except Exception as error:  # whatever a user's tool raises
            warnings.warn(
                f"the tool {tool.name} did not close: {type(error).__name__}: {error}", stacklevel=1
            )


def _limited(
    config: InterpreterConfig, workers: int | None, longest: float, isolation: str
) -> InterpreterConfig:
    """With what the run's own configuration says above the tool's."""
    return replace(
        config,
        workers=workers or config.workers,
        default_timeout=min(config.default_timeout, longest),
        isolation=config.isolation if isolation == "auto" else isolation,
    )


def _load(entry: Any, where: str, workers: int | None, longest: float, isolation: str) -> Tool:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise ValueError(
            f"{where}: expected a mapping with a class_name, such as {INTERPRETERS[0]}."
        )
    name = entry["class_name"]
    config = entry.get("config") or {}
    schema = entry.get("tool_schema")
    try:
        if not isinstance(config, dict):
            raise ValueError(f"config is a {type(config).__name__}, not a mapping.")
        if name in INTERPRETERS:
            return CodeInterpreter(
                _limited(interpreter_config(config), workers, longest, isolation), schema
            )
        return _made(name, config, schema)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def interpreter_config(config: Mapping[str, Any]) -> InterpreterConfig:
    """Typed; an unknown key is named with its nearest neighbour."""
    known = [field.name for field in fields(InterpreterConfig)]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise ValueError(
                f"unknown config key {key!r}{f'; did you mean {near[0]!r}?' if near else ''} Known: "
                f"{', '.join(known)}."
            )
    return InterpreterConfig(**{str(key): value for key, value in config.items()})


def _made(path: str, config: Mapping[str, Any], schema: Any) -> Tool:
    """A tool of the user's: what is at `path` is called with its config and schema.

    ValueError where that isn't a `Tool`.
    """
    module, _, name = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        said = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"class_name={path} can't be imported ({said}). The code interpreter's is {INTERPRETERS[0]}."
        ) from error
    try:
        tool = make(config, schema)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{path} can't be made with its config and tool_schema ({type(error).__name__}: {error})."
        ) from error
    missing = [part for part in ("name", "schema", "call", "close") if not hasattr(tool, part)]
    if missing:
        raise ValueError(
            f"{path} makes a {type(tool).__name__} without {', '.join(missing)}: see "
            "retool.rl.agent.tools.Tool."
        )
    if not (inspect.iscoroutinefunction(tool.call) or hasattr(tool.call, "__wrapped__")):
        raise ValueError(
            f"{path}.call isn't a coroutine function: write 'async def call', and await in it what takes "
            "time."
        )
    check_schema(tool.name, tool.schema)
    return tool
