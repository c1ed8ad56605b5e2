"""Finds the environment that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from retool.data.read.user_function import load_object
from retool.rl.agent.environments.protocol import KeepsForRun
from retool.rl.agent.environments.sandboxed import SandboxedMaker
from retool.rl.agent.tools.interpreter import InterpreterConfig
from retool.rl.reward.source import OF_PROGRAM

WANTED = "a class with reset(row) and step(message), or a function that makes such an object"


@dataclass(frozen=True)
class EnvironmentSource:
    """Where environments are from: what is called `name` in the file `path`, or `own`, of the
    program that asked for the run. It is called with `kwargs` for each trajectory. Without both,
    `name` is LIBRARY:NAME, of one of `LIBRARIES`. `sandboxed`: the file's code runs in a sandbox of
    this kind, and not here.
    """

    name: str
    path: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    sandboxed: InterpreterConfig | None = None
    own: Callable[..., Any] | None = None

    def load(self) -> Callable[[], Any]:
        """What makes an environment. ValueError where there is none of that name, or it is a class
        that can't be one.
        """
        found = self.own
        if self.sandboxed is not None:
            if self.path is None or found is not None:
                raise ValueError(
                    "sandboxed=true needs a class in a file of its own: what a library or a program "
                    "holds runs in this process."
                )
            return SandboxedMaker(self.path, self.name, self.kwargs, self.sandboxed)
        if found is None and self.path is None:
            library, _, name = self.name.partition(":")
            return LIBRARIES[library](name, self.kwargs)
        if found is None:
            assert self.path is not None
            found = load_object(self.path, self.name)
        if not callable(found):
            raise ValueError(f"{self.name!r} is a {type(found).__name__}: give {WANTED}.")
        if isinstance(found, type):
            missing = [
                part for part in ("reset", "step") if not callable(getattr(found, part, None))
            ]
            if missing:
                raise ValueError(f"{self.name!r} has no {' and no '.join(missing)}: give {WANTED}.")
        return partial(found, **self.kwargs) if self.kwargs else found

    def classes(self) -> Sequence[type]:
        """Those that a library's environment is made of: their code is the environment's."""
        return getattr(self.load(), "classes", ())


def find_environment(
    path: str | None, name: str | None, kwargs: Mapping[str, Any]
) -> EnvironmentSource | None:
    """The environment of these keys; None where none is named. ValueError for a half of a name."""
    if path is None and name is None:
        if kwargs:
            raise ValueError("it has kwargs, but no path and no name: give the file and the class.")
        return None
    library, is_of_one, _ = (name or "").partition(":")
    if path is None and is_of_one:
        if library not in LIBRARIES:
            raise ValueError(f"{name}: {library!r} is none of {', '.join(LIBRARIES)}.")
        return EnvironmentSource(str(name), None, kwargs)
    if path is None or name is None:
        raise ValueError("it needs both path and name: the Python file, and the class in it.")
    if path == OF_PROGRAM:
        raise ValueError(
            f"the run was started by a program that gave its own class {name!r}, which is in no "
            "file. Start it from there, or give the file."
        )
    return EnvironmentSource(name, path, kwargs)


def parts_of_name(given: str) -> tuple[str | None, str]:
    """(path, name) of an environment that is named by one text: FILE.py/NAME, or LIBRARY:NAME."""
    if given.partition(":")[0] in LIBRARIES:
        return None, given
    path, _, name = given.rpartition("/")
    return path or None, name


def let_go(make: Callable[[], Any]) -> None:
    """The run is over: what `make` keeps for all of its environments may end."""
    if isinstance(make, KeepsForRun) and not isinstance(make, type):
        make.let_go()


def _of_verifiers(name: str, kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    from retool.rl.agent.environments.verifiers.house import House

    return House(name, kwargs)


def _of_openenv(name: str, kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    from retool.rl.agent.environments.openenv.source import Source

    return Source(name, kwargs)


LIBRARIES = {"verifiers": _of_verifiers, "openenv": _of_openenv}
