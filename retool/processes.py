"""Processes of our own in somebody else's program.

Python's multiprocessing runs the program's main file again in each process that it spawns, for the
sake of what may be defined there. Nothing of ours is, and a script or notebook that calls
`retool.rl(…)` in its main file would begin a run in each of them. So here that is left out, and
programs need no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import popen_forkserver, popen_spawn_posix, spawn
from multiprocessing.context import (
    ForkServerContext,
    ForkServerProcess,
    SpawnContext,
    SpawnProcess,
)
from typing import Any

MAIN_FILE = ("init_main_from_name", "init_main_from_path")
_starting = threading.Lock()


@contextmanager
def _without_main_file() -> Iterator[None]:
    """What a new process is told says nothing of the program's main file while this lasts."""
    told = spawn.get_preparation_data

    def told_less(name: str) -> dict[str, Any]:
        return {key: value for key, value in told(name).items() if key not in MAIN_FILE}

    with _starting:
        spawn.get_preparation_data = told_less
        try:
            yield
        finally:
            spawn.get_preparation_data = told


class _ForkServerPopen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        with _without_main_file():
            super()._launch(process_obj)  # type: ignore[misc]


class _SpawnPopen(popen_spawn_posix.Popen):
    def _launch(self, process_obj: Any) -> None:
        with _without_main_file():
            super()._launch(process_obj)  # type: ignore[misc]


class _ForkServerProcess(ForkServerProcess):
    _Popen = _ForkServerPopen  # type: ignore[assignment]


class _SpawnProcess(SpawnProcess):
    _Popen = _SpawnPopen  # type: ignore[assignment]


class ForkServer(ForkServerContext):
    """The context "forkserver" without the program's main file."""

    Process = _ForkServerProcess  # type: ignore[assignment]


class Spawn(SpawnContext):
    """The context "spawn" without the program's main file."""

    Process = _SpawnProcess  # type: ignore[assignment]
