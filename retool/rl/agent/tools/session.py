"""The code interpreter whose variables live on between the calls of one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retool.rl.agent.tools.interpreter import CodeInterpreter, contents_of, result_of, result_text
from retool.rl.agent.tools.of_row import kwargs_of
from retool.rl.agent.tools.protocol import ToolResult
from retool.sandbox import Result

ENDED = (
    "[The session ended with this program: what was defined before is gone, and the next call begins "
    "anew.]"
)


@dataclass
class Notebook:
    """What an answer's programs have left so far, and how many seconds they took. `files` are the
    row's, which the session begins with.
    """

    left: bytes = b""
    seconds: float = 0.0
    files: Mapping[str, bytes] = field(default_factory=dict)


class InterpreterSession:
    """The code interpreter as a `StatefulTool`.

    Each program runs in a process of its own, isolated and limited as ever. What it leaves goes to
    the answer's next program and to no other; between calls nothing runs.
    """

    keeps_time = True

    def __init__(self, interpreter: CodeInterpreter) -> None:
        self.interpreter = interpreter
        self.name = interpreter.name
        self.schema = interpreter.schema

    async def open_state(self, row: Mapping[str, Any]) -> Notebook:
        given = kwargs_of(row.get("extra_info") or {}, self.name, "execute_kwargs")
        return Notebook(files=contents_of(given.get("files"), self.name))

    async def call_state(self, state: Notebook, arguments: Mapping[str, Any]) -> ToolResult:
        code = self.interpreter.program_in(arguments)
        if isinstance(code, ToolResult):
            return code
        config = self.interpreter.config
        seconds_left = config.session_timeout - state.seconds
        if seconds_left <= 0:
            text = f"TimeoutError: the session's {config.session_timeout:g} s are used up."
            return ToolResult(text, "timeout")
        timeout = min(config.default_timeout, seconds_left)
        # The row's files are laid out once: later calls find them in what the session kept.
        files = {} if state.left else state.files
        result = await self.interpreter.run(code, timeout, state.left, files)
        state.seconds += result.execution_time
        state.left = result.session
        # A sandbox that failed isn't the program's end: the call is told as lost, not the session
        # as over.
        return result_of(result) if state.left or result.infrastructure else _ended(result)

    async def close_state(self, state: Notebook) -> None:
        state.left = b""

    async def close(self) -> None:
        await self.interpreter.close()


def _ended(result: Result) -> ToolResult:
    """The answer to a program that left nothing: it died, or was killed, or left too much."""
    text = f"{result_text(result)}\n{ENDED}"
    return ToolResult(text, result.status, result.execution_time, result.queue_seconds)
