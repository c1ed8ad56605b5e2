"""The processes of this machine: those below some, and those that a run has left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    command: str


def running() -> list[Process]:
    """All that haven't ended."""
    found = list[Process]()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state not in "ZX":
                found.append(Process(int(entry.name), int(parent), command))
    return found


def below(pids: Collection[int]) -> list[Process]:
    """What these processes have started, and what that has."""
    inside = set(pids)
    everything = running()
    found = list[Process]()
    while more := [p for p in everything if p.parent in inside and p.pid not in inside]:
        inside |= {process.pid for process in more}
        found += more
    return found


@contextlib.contextmanager
def orphans_adopted() -> Iterator[None]:
    """Processes below this one whose parent ends become its children, so that none gets lost."""
    system = ctypes.CDLL(None)
    system.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        system.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def children() -> set[int]:
    return {process.pid for process in running() if process.parent == os.getpid()}


def left(before: Collection[int], patience_s: float) -> list[Process]:
    """Children that weren't there `before` and don't end within that time; they are killed."""
    end = time.monotonic() + patience_s
    while True:
        fresh = children() - set(before)
        if not fresh or time.monotonic() > end:
            break
        time.sleep(0.05)
    found = [process for process in running() if process.pid in fresh]
    for process in found:
        os.kill(process.pid, signal.SIGKILL)
    for pid in _ended():
        if pid not in before:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return found


def _ended() -> list[int]:
    """Children that have ended and are still to be asked how."""
    found = list[int]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state == "Z" and int(parent) == os.getpid():
                    found.append(int(entry.name))
    return found
