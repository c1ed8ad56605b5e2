"""The code interpreter that keeps its variables between the calls of one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retool.rl.agent.tools.interpreter import (
    SCHEMA,
    CodeInterpreter,
    contents_of,
    result_of,
    result_text,
)
from retool.rl.agent.tools.of_row import kwargs_of
from retool.rl.agent.tools.protocol import ToolResult, function_of
from retool.sandbox import Result

SESSION_SCHEMA: dict[str, Any] = {
    **SCHEMA,
    "function": {
        **function_of(SCHEMA),
        "description": "A tool for executing code. Variables and files live on between calls.",
    },
}
UNDONE = "[What this program defined is lost; what was there before it is there again.]"
ENDED = "[What was defined before can't be restored: it is gone, and the next call begins anew.]"


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
        if result.infrastructure:
            return result_of(result)
        if result.died_restoring:
            state.left = b""
            return _with_note(result, ENDED)
        if not result.session:  # `left` stays: the next call finds what this one found
            return _with_note(result, UNDONE)
        state.left = result.session
        return result_of(result)

    async def close_state(self, state: Notebook) -> None:
        state.left = b""

    async def close(self) -> None:
        await self.interpreter.close()


def _with_note(result: Result, note: str) -> ToolResult:
    """The answer to a program that left nothing: it died, or was killed."""
    text = f"{result_text(result)}\n{note}"
    return ToolResult(text, result.status, result.execution_time, result.queue_seconds)
