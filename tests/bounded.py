"""A call in a process of its own with limits: a hang inside a C function answers to no signal, and
would take all tests with it.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


class Outcome(NamedTuple):
    """What a call gave or raised, and how long it took."""

    value: Any
    error: str  # "ValueError: …", or empty
    seconds: float


def bounded(call: Callable[[], Any], seconds: float = 5.0, megabytes: int = 300) -> Outcome:
    """`call()` in a fork of this process, with `megabytes` more memory than it has.

    The test fails where a limit is passed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run(call, writer, megabytes)
    os.close(writer)
    killer = _killed_after(child, seconds)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, killer)
    if not answer:
        pytest.fail(
            f"ended by signal {os.waitstatus_to_exitcode(status)} within the limit of {seconds} s and {megabytes} MB"
        )
    outcome = Outcome(*pickle.loads(answer))
    assert not outcome.error.startswith("MemoryError"), f"more than {megabytes} MB"
    return outcome


def _run(call: Callable[[], Any], writer: int, megabytes: int) -> None:
    """In the fork: send what comes of `call()`, and end without returning."""
    begin = time.perf_counter()
    value = None
    error = ""
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (megabytes << 20), resource.RLIM_INFINITY))
        value = call()
        pickle.dumps(value)
    except BaseException as failure:
        value = None
        error = f"{type(failure).__name__}: {failure}"
    try:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps((value, error, time.perf_counter() - begin)))
    finally:
        os._exit(0)


def _killed_after(child: int, seconds: float) -> Any:
    """Kill the child when its time is up. Returns the handler to put back."""
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    return before
