"""An environment whose code runs in the sandbox: every call of it is a program there.

The programs of a trajectory are a session: what the object keeps lives on from one to the next, and
no process does between them. So an environment may run what the model wrote, and can't reach the
run, the network or the machine's files.
"""

from __future__ import annotations

import ast
import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retool.rl.agent.tools.interpreter import CodeInterpreter, InterpreterConfig, result_text
from retool.sandbox import Limits, Result

MARK = "retool's answer: "  # before what a program gives, on a line of its own

# Laid behind the user's file. What the environment prints isn't read for an answer.
BEGIN = """

def retool_answer(method, given):
    import contextlib
    import json
    import sys

    with contextlib.redirect_stdout(sys.stderr):
        value = getattr(retool_world, method, lambda *given: None)(*json.loads(given))
    answer = {{"is_tuple": isinstance(value, tuple), "value": value}}
    print({mark!r} + json.dumps(answer, default=lambda number: number.item()))


import json as retool_json

retool_world = {name}(**retool_json.loads({kwargs!r}))
"""
CALL = "retool_answer({method!r}, {given!r})\n"


class SandboxedMaker:
    """Called, it makes the environment of a trajectory; all share the sandbox of this machine.

    `path` is the file that has the class, or the function, `name`. It isn't imported here.
    ValueError where it has none, or where `kwargs` can't be sent as JSON.
    """

    keeps_time = True  # of each call from its program's start, not in the sandbox's queue

    def __init__(
        self, path: str, name: str, kwargs: Mapping[str, Any], config: InterpreterConfig
    ) -> None:
        source = _source_with(path, name)
        try:
            sent = json.dumps(dict(kwargs))
        except TypeError as error:
            raise ValueError(f"its kwargs go to the sandbox as JSON: {error}.") from error
        self._begin = source + BEGIN.format(mark=MARK, name=name, kwargs=sent)
        self._config = config
        self._lock = threading.Lock()
        self._interpreter: CodeInterpreter | None = None

    def __call__(self) -> SandboxedWorld:
        with self._lock:  # each world is made on a thread of its own
            if self._interpreter is None:
                self._interpreter = CodeInterpreter(self._config)
        return SandboxedWorld(self._interpreter, self._begin)

    def let_go(self) -> None:
        if self._interpreter is not None:
            asyncio.run(self._interpreter.close())


class SandboxedWorld:
    """An `Environment`: the object is made in the sandbox by `reset`, and what is left of it there
    after each call is held here, as bytes that nobody reads.
    """

    def __init__(self, interpreter: CodeInterpreter, begin: str) -> None:
        self._interpreter = interpreter
        self._begin = begin
        self._left = b""

    async def reset(self, row: Mapping[str, Any]) -> Any:
        return await self._call("reset", row, begin=self._begin)

    async def step(self, message: Mapping[str, Any]) -> Any:
        return await self._call("step", message)

    async def cut(self, message: Mapping[str, Any] | None) -> Any:
        return await self._call("cut", message)

    async def close(self) -> None:
        if self._left:
            await self._call("close")

    async def _call(self, method: str, *given: Any, begin: str = "") -> Any:
        """What the object's method returns. RuntimeError for what it raises, and where it is lost."""
        sent = json.dumps(given, default=str)
        program = begin + CALL.format(method=method, given=sent)
        result = await self._interpreter.run(program, session=self._left)
        self._left = result.session
        most = Limits().output_kb
        if result.stdout_bytes > most << 10:
            # The answer, which comes last, isn't whole, or isn't there
            raise RuntimeError(
                f"its answer, with what else the program printed, has more than {most} KB"
            )
        answer = _answer_in(result)
        if answer is None:
            raise RuntimeError(result.reason or result_text(result))
        if not self._left:
            raise RuntimeError(f"what it keeps can't be kept: {result_text(result)}")
        return tuple(answer["value"]) if answer["is_tuple"] else answer["value"]


def _answer_in(result: Result) -> dict[str, Any] | None:
    """What a program gave; None where it gave nothing."""
    if not result.ok:
        return None
    lines = result.stdout.splitlines()
    found = [line for line in lines if line.startswith(MARK)]
    return json.loads(found[-1].removeprefix(MARK)) if found else None


def _source_with(path: str, name: str) -> str:
    """The text of a Python file that defines `name`. ValueError where it doesn't."""
    try:
        source = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}.") from error
    kinds = (ast.ClassDef, ast.FunctionDef)
    there = {node.name for node in tree.body if isinstance(node, kinds)}
    if name not in there:
        raise ValueError(
            f"{path} defines no {name!r}; it has {', '.join(sorted(there)) or 'none'}."
        )
    return source
