"""The caller's side of the embedded backend: starts the sandbox's processes, hands calls over, brings results back."""

from __future__ import annotations

import asyncio
import atexit
import base64
import concurrent.futures
import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from . import spawn
from .connection import Connection
from .layers import Plan
from .pool import sweep
from .result import Limits, Result, safe_name

_FENCE = re.compile(r"\A\s*```(?:python|py|python3)?[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL | re.IGNORECASE)
RETRIES = 3  # how often a call is tried again after the sandbox failed under it
BACKOFF = 0.25  # seconds before the first of those attempts; each further one waits twice as long
LONGEST_BACKOFF = 30.0
STEADY = 60.0  # seconds after which a supervisor counts as sound: the next restart is a first one again


def strip_fence(code: str) -> str:
    """The code inside a Markdown fence around the whole of it; anything else unchanged."""
    fenced = _FENCE.match(code)
    return fenced.group(1) if fenced else code


class Sandbox:
    """Runs untrusted Python programs on this machine, each in a process the kernel has confined.

    Start one per node, before CUDA is touched if you can (it doesn't matter to the programs: nothing is forked from this process).
    `workers` programs run at once, the rest wait in order of arrival; None: as many as there are cores, at least 4. Each may use
    `limits.memory_mb`. With `isolation="strict"` (default) construction fails with `ValueError` where a guarantee has no mechanism on
    this machine; with `"best_effort"` it warns on stderr once and goes on. `without` leaves isolation layers out and `launcher` is a
    command to start the server through: both are for tests. Safe to use from several threads and event loops.

    A supervisor that died, by `kill -9` say, is started again by the next call, later and later while it keeps dying. Calls that were
    lost with it are run again, up to `RETRIES` times; programs have no effect outside, so running one twice does no harm. What
    still fails comes back as `sandbox_error` (`Result.infrastructure`), never as an exception and never under a program's own status.
    `restarts` counts the supervisors that had to be replaced.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        workers: int | None = None,
        isolation: Literal["strict", "best_effort"] = "strict",
        *,
        without: frozenset[str] = frozenset(),
        python: str = sys.executable,
        launcher: Sequence[str] = (),
    ) -> None:
        if isolation not in ("strict", "best_effort"):
            raise ValueError(f"sandbox.isolation={isolation!r} must be 'strict' or 'best_effort'.")
        self.limits = limits or Limits()
        self.workers = max(4, len(os.sched_getaffinity(0))) if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"sandbox workers={workers} must be at least 1.")
        self._setup = {"limits": vars(self.limits), "workers": self.workers, "without": sorted(without), "isolation": isolation}
        self._python, self._launcher = python, launcher
        self._restarting = threading.Lock()
        self._closed = False
        self._attempts = 0  # restarts in a row
        self._started = 0.0
        self.restarts = 0
        self._start()
        self._warn()
        self._at_exit = weakref.WeakMethod(self.close)
        atexit.register(_close, self._at_exit)

    # -- the supervisor ------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._process.pid

    def _start(self) -> None:
        """Start a supervisor and hear what it found. ValueError where it refuses, OSError where it fails."""
        ours, theirs = socket.socketpair()
        self._process = spawn.start("supervisor", self._setup, theirs, self._python, self._launcher)
        theirs.close()
        try:
            self._connection = Connection(ours)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise
        if "refused" in self._connection.hello:
            self._connection.close()
            self._process.wait()
            raise ValueError(
                f"sandbox.isolation=strict: {self._connection.hello['refused']} "
                "Run `python -m retool.rl.sandbox doctor` for the whole picture, or accept the risk with sandbox.isolation=best_effort."
            )
        hello = self._connection.hello["hello"]
        self.plan = Plan.from_json(hello["plan"])
        self.unmet: dict[str, str] = hello["unmet"]
        self.server_pid: int = hello["server"]
        self.scratch: str = hello["scratch"]
        self._started = time.monotonic()

    def _warn(self) -> None:
        if self.unmet:
            lost = ", ".join(self.unmet)
            print(f"SANDBOX WARNING: running WITHOUT: {lost}. Generated programs can do harm here.", file=sys.stderr, flush=True)

    def _revive(self) -> str:
        """Start the supervisor again if it is gone, which takes a while; "", or why there is none."""
        if self._connection.alive:
            return ""
        with self._restarting:  # one caller restarts it, the others wait for that
            if self._closed:
                return "the sandbox is closed"
            if self._connection.alive:
                return ""
            self._process.kill()  # it may have closed its socket and hang
            self._process.wait()
            sweep(self.scratch)
            self._attempts = 0 if time.monotonic() - self._started > STEADY else self._attempts
            time.sleep(backoff(self._attempts - 1) if self._attempts else 0.0)
            self._attempts += 1
            try:
                self._start()
            except (OSError, ValueError) as error:
                return f"the sandbox's supervisor died and can't be started again: {error}"
            self.restarts += 1
            return ""

    # -- calls ---------------------------------------------------------------------------------------------------------------

    async def run(
        self,
        code: str,
        stdin: str = "",
        timeout: float | None = None,
        *,
        memory_mb: int | None = None,
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
    ) -> Result:
        """Run `code` and wait for its end without blocking the event loop.

        `timeout` in wall seconds, from the program's start, and `memory_mb` replace the limits' own. `files` (relative path → content)
        are laid into the work folder first; `fetch` names files to bring back. Errors of the program are in the result; `ValueError`
        is for the caller's. Cancelling the task ends the program.
        """
        message = self._message(code, stdin, timeout, memory_mb, files or {}, fetch)
        begun = time.monotonic()
        result = await self._attempt(message)
        for attempt in range(RETRIES):
            if self._closed or not result.infrastructure:
                break
            await asyncio.sleep(backoff(attempt))
            result = _since(begun, await self._attempt(message))
        return result

    async def _attempt(self, message: dict[str, Any]) -> Result:
        """One try: a result, which is infrastructure's where the sandbox failed."""
        alive = self._connection.alive  # else it has to be started, which takes a while: not on the event loop
        connection, number, future = self._submit(message) if alive else await asyncio.to_thread(self._submit, message)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            connection.cancel(number)
            raise

    def run_blocking(
        self,
        code: str,
        stdin: str = "",
        timeout: float | None = None,
        *,
        memory_mb: int | None = None,
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
    ) -> Result:
        """`run` for callers without an event loop."""
        message = self._message(code, stdin, timeout, memory_mb, files or {}, fetch)
        begun = time.monotonic()
        result = self._submit(message)[2].result()
        for attempt in range(RETRIES):
            if self._closed or not result.infrastructure:
                break
            time.sleep(backoff(attempt))
            result = _since(begun, self._submit(message)[2].result())
        return result

    def _submit(self, message: dict[str, Any]) -> tuple[Connection, int, concurrent.futures.Future[Result]]:
        """Hand a call over: the connection that has it, its number there, and the future of its result."""
        problem = self._revive()
        if problem:
            future: concurrent.futures.Future[Result] = concurrent.futures.Future()
            future.set_result(Result("sandbox_error", reason=problem))
            return self._connection, -1, future
        connection = self._connection
        return connection, *connection.submit(message)

    def _message(
        self, code: str, stdin: str, timeout: float | None, memory_mb: int | None, files: Mapping[str, bytes], fetch: Sequence[str]
    ) -> dict[str, Any]:
        """A call as the supervisor reads it; ValueError for what can't be asked."""
        limits = {} if timeout is None else {"wall_seconds": timeout, "cpu_seconds": max(timeout, self.limits.cpu_seconds)}
        limits |= {} if memory_mb is None else {"memory_mb": memory_mb}
        if any(not value > 0 for value in limits.values()):
            raise ValueError(f"timeout={timeout} and memory_mb={memory_mb} must be above 0.")
        encoded = {safe_name(name): base64.b64encode(content).decode("ascii") for name, content in files.items()}
        job = {"code": strip_fence(code), "stdin": stdin, "files": encoded}
        return {"job": job, "limits": limits, "fetch": [safe_name(name) for name in fetch]}

    def close(self) -> None:
        """End every program and every process of the sandbox, and remove its files. Calls in flight get `sandbox_error`."""
        if self._closed:
            return
        self._closed = True
        with self._restarting:  # nobody starts another meanwhile
            self._connection.hang_up()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()
        atexit.unregister(_close)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_closed", True) is False:
            with contextlib.suppress(AttributeError):  # construction failed half-way
                self.close()


def backoff(attempt: int) -> float:
    """Seconds to wait before attempt number `attempt`, counted from 0."""
    return min(LONGEST_BACKOFF, BACKOFF * 2**attempt)


def _since(begun: float, result: Result) -> Result:
    """The result with all that went by before its program started, lost attempts too, as time in the queue."""
    return replace(result, queue_seconds=time.monotonic() - begun - result.execution_time)


def _close(method: weakref.WeakMethod[Any]) -> None:
    close = method()
    if close is not None:
        close()
