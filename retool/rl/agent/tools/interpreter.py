"""The code interpreter as a tool: programs go to the sandbox of this machine, or to a server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retool.rl.agent.tools.protocol import ToolResult, function_of
from retool.sandbox import Limits, Result, Sandbox
from retool.sandbox.fusion_client import SandboxFusion
from retool.sandbox.result import safe_name

MAX_STDERR_LINES = 12  # that the model reads, the last ones
TRIAL_SECONDS = 20.0  # that a program of ours may take before the run
STALLED_SECONDS = 600.0  # without the end of any program, after which a sandbox counts as dead

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

# Keys of the configuration that are numbers above 0
POSITIVE = (
    "num_workers",
    "rate_limit",
    "default_timeout",
    "memory_limit_mb",
    "workers",
    "session_timeout",
)
# What the model is told a program died of, by the status of its result
ERROR_NAMES = {
    "timeout": "TimeoutError",
    "memory_limit": "MemoryError",
    "output_limit": "OutputLimitError",
    "process_limit": "ProcessLimitError",
    "sandbox_error": "SandboxError",
}


@dataclass(frozen=True)
class InterpreterConfig:
    """`config:` of the code interpreter. Without `sandbox_fusion_url`, programs run on this machine.

    `num_workers` bounds the programs at once. On this machine the number of cores does, too, unless
    `workers` says how many. `rate_limit` bounds the requests under way at a server, where
    `enable_global_rate_limit`. `default_timeout` counts seconds from a program's start,
    `memory_limit_mb` is per call, `token` is the server's. With `session`, variables and files live on
    between the calls of an answer, whose programs may take `session_timeout` seconds in all.
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
    session: bool = False
    session_timeout: float = 300

    def __post_init__(self) -> None:
        if self.type != "native":
            raise ValueError(f"tool type={self.type!r} isn't known; 'native' is.")
        if self.default_language != "python":
            raise ValueError(
                f"default_language={self.default_language!r} can't be run; 'python' can."
            )
        if self.session and self.sandbox_fusion_url:
            raise ValueError(
                "session=true needs the sandbox of this machine: leave sandbox_fusion_url out."
            )
        for name in POSITIVE:
            value = getattr(self, name)
            if name == "workers" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}={value!r} must be a number above 0.")


class CodeInterpreter:
    """Runs the program in its one argument and tells the model what happened.

    It starts its sandbox at once, so that a fault shows early. Programs queue, and the sandbox
    limits each from its start. Only where no program has ended for `STALLED_SECONDS` are those that
    wait given up, as a failure of the infrastructure.
    """

    # The loop must not count a program's seconds in the queue: the sandbox knows when it starts.
    keeps_time = True

    def __init__(
        self, config: InterpreterConfig | None = None, schema: dict[str, Any] | None = None
    ) -> None:
        self.config = config or InterpreterConfig()
        self.schema = schema or SCHEMA
        self.name = function_of(self.schema)["name"]
        self._argument = _only_argument(self.schema)
        self._backend = _open_backend(self.config)
        self._last_end = 0.0  # of a program, on the event loop's clock

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """`arguments` are those the model wrote, parsed; wrong ones are answered, not raised. `files`
        among them are the row's, which the program finds.
        """
        code = self.program_in(arguments)
        if isinstance(code, ToolResult):
            return code
        files = contents_of(arguments.get("files"), self.name)
        return result_of(await self.run(code, files=files))

    def program_in(self, arguments: Mapping[str, Any]) -> str | ToolResult:
        """The program that a call has, or what is answered to one without."""
        code = arguments.get(self._argument)
        if isinstance(code, str):
            return code
        given = ", ".join(map(str, arguments)) or "none"
        text = (
            f"ArgumentError: {self.name} needs the argument {self._argument!r}, a string "
            f"(given: {given})."
        )
        return ToolResult(text, "bad_arguments")

    async def trial(self) -> str:
        """Run a program of ours: why it doesn't give what it must; "" where it does."""
        try:
            result = await asyncio.wait_for(self.run("print(6 * 7)"), TRIAL_SECONDS)
        except asyncio.TimeoutError:
            return f"no answer within {TRIAL_SECONDS:g} s"
        finally:
            # A client's connections belong to this event loop; the run has another
            if isinstance(self._backend, SandboxFusion):
                await self._backend.close()
        if result.ok and result.stdout.strip() == "42":
            return ""
        if result.reason:
            return result.reason
        return f"print(6 * 7) gives {result_text(result)[:200]!r} ({result.status})"

    async def run(
        self,
        code: str,
        timeout: float | None = None,
        session: bytes | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Result:
        """What a program comes to within `timeout` seconds (None: as configured). `session` is what
        the program before it left, and `files` are laid beside it: see `Sandbox.run`.
        """
        loop = asyncio.get_running_loop()
        seconds = self.config.default_timeout if timeout is None else timeout
        patience = STALLED_SECONDS + self.config.default_timeout
        if session is None or not isinstance(self._backend, Sandbox):
            running = self._backend.run(code, timeout=seconds, files=files)
        else:
            running = self._backend.run(code, timeout=seconds, files=files, session=session)
        work = loop.create_task(running)
        begin = loop.time()
        try:
            # Waits in steps: as long as other programs end, the sandbox works, and this one is only
            # queued.
            while not work.done():
                await asyncio.wait([work], timeout=patience)
                quiet_since = max(begin, self._last_end)
                if not work.done() and loop.time() - quiet_since >= patience:
                    reason = f"no program has ended for {patience:g} s"
                    return Result("sandbox_error", reason=reason)
            self._last_end = loop.time()
            return work.result()
        finally:
            work.cancel()

    async def close(self) -> None:
        if isinstance(self._backend, Sandbox):
            self._backend.close()
        else:
            await self._backend.close()


def _only_argument(schema: Mapping[str, Any]) -> str:
    """The name of the argument that holds the program."""
    parameters = schema["function"].get("parameters") or {}
    names = parameters.get("required") or list(parameters.get("properties") or {})
    if len(names) != 1:
        raise ValueError(
            f"the code interpreter takes one argument, its schema requires {list(names)}."
        )
    return str(names[0])


def contents_of(given: Any, tool: str) -> dict[str, bytes]:
    """The files that a row gives the interpreter, name → text, as bytes. ValueError in another form."""
    where = f"extra_info.tools_kwargs.{tool}.execute_kwargs.files"
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{where} is a {type(given).__name__}: give a mapping from file names to texts."
        )
    contents: dict[str, bytes] = {}
    for name, text in given.items():
        if text is None:
            continue  # a column that other rows have
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name!r} is a {type(text).__name__}: give its text.")
        contents[safe_name(str(name))] = text.encode()
    return contents


def _open_backend(config: InterpreterConfig) -> Sandbox | SandboxFusion:
    """The server that the configuration names, or a sandbox on this machine."""
    if config.sandbox_fusion_url:
        most_requests = config.num_workers
        if config.enable_global_rate_limit:
            most_requests = min(most_requests, config.rate_limit)
        return SandboxFusion(
            config.sandbox_fusion_url,
            most_requests,
            config.default_timeout,
            config.memory_limit_mb,
            token=config.token,
        )
    # Not os.cpu_count: a container may have fewer cores than the machine.
    cores = len(os.sched_getaffinity(0))
    # `isolation` is a text, which the sandbox checks
    isolation: Any = config.isolation
    return Sandbox(
        Limits(wall_seconds=config.default_timeout, memory_mb=config.memory_limit_mb),
        config.workers or min(config.num_workers, max(4, cores)),
        isolation,
        share=node_of(os.environ),
    )


def node_of(environment: Mapping[str, str]) -> str:
    """A name that all ranks of this run on this node have in common, under which they share one
    sandbox; "" for a process alone.
    """
    ranks = environment.get("LOCAL_WORLD_SIZE") or environment.get("WORLD_SIZE") or "1"
    if ranks == "1":
        return ""
    run = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK")
    return " ".join(environment.get(name, "") for name in run)


def result_of(result: Result) -> ToolResult:
    """What a program came to, as a tool's answer."""
    text = result_text(result)
    return ToolResult(text, result.status, result.execution_time, result.queue_seconds)


def result_text(result: Result) -> str:
    """What the model reads: stdout, the last lines of stderr, and what stopped the program, if
    anything did.
    """
    parts = []
    if result.stdout.strip("\n"):
        parts.append(result.stdout.rstrip("\n"))
    bytes_left_out = result.stdout_bytes - len(result.stdout.encode("utf-8", "replace"))
    if bytes_left_out > 0:
        parts.append(f"[{bytes_left_out} more bytes of output]")
    if result.stderr.strip():
        lines = result.stderr.rstrip("\n").split("\n")
        if len(lines) > MAX_STDERR_LINES:
            parts.append("[…]")
        parts += lines[-MAX_STDERR_LINES:]
    if result.status in ERROR_NAMES:
        parts.append(f"{ERROR_NAMES[result.status]}: {result.reason}")
    elif result.status == "error" and not result.stderr.strip():
        reason = f", {result.reason}" if result.reason else ""
        parts.append(f"[the program ended with return code {result.return_code}{reason}]")
    return "\n".join(parts) or "[no output]"
