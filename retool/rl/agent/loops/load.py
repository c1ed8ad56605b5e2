"""Finds the loop that a configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retool.data.read.user_function import load_object
from retool.rl.agent.loops.protocol import SIGNATURE
from retool.rl.reward.source import OF_PROGRAM


@dataclass(frozen=True)
class LoopSource:
    """Where a loop is from: the function `name` of the file `path`, or `own`, of the program that
    asked for the run.
    """

    name: str
    path: str | None = None
    own: Callable[..., Any] | None = None

    def load(self) -> Callable[..., Any]:
        """The function. ValueError where there is none of that name, or it can't be a loop."""
        found = self.own
        if found is None:
            assert self.path is not None
            found = load_object(self.path, self.name)
        wanted = SIGNATURE.format(name=self.name)
        if isinstance(found, type) or not callable(found):
            kind = "class" if isinstance(found, type) else type(found).__name__
            raise ValueError(f"{self.name!r} is a {kind}: give a function, {wanted}.")
        called = found if inspect.isroutine(found) else type(found).__call__
        if not inspect.iscoroutinefunction(inspect.unwrap(called)):
            raise ValueError(f"{self.name!r} is no coroutine function: write {wanted}.")
        try:
            inspect.signature(found).bind({}, None, None)
        except TypeError as error:
            raise ValueError(f"{self.name!r} can't be called ({error}): write {wanted}.") from error
        return found


def find_loop(path: str | None, name: str | None) -> LoopSource | None:
    """The loop of these keys; None where none is named. ValueError for a half of a name."""
    if path is None and name is None:
        return None
    if path is None or name is None:
        raise ValueError("it needs both path and name: the Python file, and the function in it.")
    if path == OF_PROGRAM:
        raise ValueError(
            f"the run was started by a program that gave its own function {name!r}, which is in no "
            "file. Start it from there, or give the file."
        )
    return LoopSource(name, path)
