"""The caller's side of the embedded backend: starts the sandbox's processes, hands calls over,
brings results back.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import concurrent.futures
import functools
import os
import re
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from .connection import Connection
from .keeper import Keeper, backoff
from .kept import SNAPSHOT
from .layers import Plan
from .result import Limits, Result, safe_files, safe_name
from .shortage import OPEN_FILES

_FENCE = re.compile(
    r"\A\s*```(?:python|py|python3)?[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL | re.IGNORECASE
)
RETRIES = 3  # how often a call is tried again after the sandbox failed under it


def strip_fence(code: str) -> str:
    """The code inside a Markdown fence around the whole of it; anything else unchanged."""
    fenced = _FENCE.match(code)
    return fenced.group(1) if fenced else code


class Sandbox:
    """Runs untrusted Python programs on this machine, each in a process the kernel has confined.

    Start one per node, before CUDA is touched if you can (it doesn't matter to the programs:
    nothing is forked from this process). `workers` programs run at once, the rest wait in order of
    arrival; None: as many as there are cores, at least 4. Each may use `limits.memory_mb`. With
    `isolation="strict"` (default) construction fails with `ValueError` where a guarantee has no
    mechanism on this machine; with `"best_effort"` it warns on stderr once and goes on. `servers`
    fork servers make the programs' processes; None: one for each four cores, at least 1 and at most
    8. `without` leaves isolation layers out and `launcher` is a command to start the server
    through: both are for tests. Safe to use from several threads and event loops.

    A supervisor that died, by `kill -9` say, is started again by the next call, later and later
    while it keeps dying. Calls that were lost with it are run again, up to `RETRIES` times;
    programs have no effect outside, so running one twice does no harm. What still fails comes back
    as `sandbox_error` (`Result.infrastructure`), never as an exception and never under a program's
    own status. `restarts` counts the supervisors that had to be replaced.

    `share` names a sandbox that all processes of this user on this machine use together, if they
    ask for the same limits, workers, servers and isolation: the first of them owns it, and when
    that one ends another takes over, without a call being lost.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        workers: int | None = None,
        isolation: Literal["strict", "best_effort"] = "strict",
        *,
        share: str = "",
        servers: int | None = None,
        without: frozenset[str] = frozenset(),
        python: str = sys.executable,
        launcher: Sequence[str] = (),
    ) -> None:
        if isolation not in ("strict", "best_effort"):
            raise ValueError(f"sandbox.isolation={isolation!r} must be 'strict' or 'best_effort'.")
        self.limits = limits or Limits()
        self.workers = max(4, len(os.sched_getaffinity(0))) if workers is None else workers
        for name, count in (("workers", self.workers), ("servers", servers)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"sandbox {name}={count!r} must be a whole number, at least 1.")
        setup = {
            "limits": vars(self.limits),
            "workers": self.workers,
            "servers": servers,
            "without": sorted(without),
            "isolation": isolation,
        }
        self._keeper = Keeper(setup, share, python, launcher)
        if self.unmet and self.owner:
            lost = ", ".join(self.unmet)
            print(
                f"SANDBOX WARNING: running WITHOUT: {lost}. Generated programs can do harm here.",
                file=sys.stderr,
                flush=True,
            )
        if self.owner and self.plan.slots < self.workers:
            print(
                f"SANDBOX WARNING: {self.plan.slots} of {self.workers} programs can run at once: no "
                f"more files may be open here. To run all, {OPEN_FILES}.",
                file=sys.stderr,
                flush=True,
            )
        # Weak, or `atexit` would keep every sandbox alive until the process ends.
        self._at_exit = functools.partial(_close, weakref.WeakMethod(self.close))
        atexit.register(self._at_exit)

    @property
    def owner(self) -> bool:
        """Whether the supervisor is this process's own; a guest of another's only has a connection
        to it.
        """
        return self._keeper.owner

    @property
    def restarts(self) -> int:
        """How many supervisors had to be replaced."""
        return self._keeper.restarts

    @property
    def plan(self) -> Plan:
        """The layers of isolation in use."""
        return self._keeper.plan

    @property
    def unmet(self) -> dict[str, str]:
        """Guarantees that nothing upholds here, each with the reasons and the way out; empty under
        strict isolation.
        """
        return self._keeper.hello["unmet"]

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._keeper.hello["pid"]

    @property
    def server_pids(self) -> list[int]:
        """The process ids of the fork servers, as they were when this connection was made; if the
        first ends, the others do.
        """
        return self._keeper.hello["servers"]

    @property
    def scratch(self) -> str:
        """The supervisor's folder on the host."""
        return self._keeper.hello["scratch"]

    # --- calls ---

    async def run(
        self,
        code: str,
        stdin: str = "",
        timeout: float | None = None,
        *,
        memory_mb: int | None = None,
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
        session: bytes | None = None,
    ) -> Result:
        """Run `code` and wait for its end without blocking the event loop.

        `timeout` in wall seconds, from the program's start, and `memory_mb` replace the limits'
        own. `files` (relative path → content) are laid into the work folder first; `fetch` names
        files to bring back. `session` is what the program before it left (`Result.session`): its
        variables and files are there again; b"" begins one, None: there is none. Errors of the
        program are in the result; `ValueError` is for the caller's. Cancelling the task ends the
        program.
        """
        # A session is a file like any other: laid into the work folder, and fetched from it at the
        # end.
        if session is not None:
            files = {**(files or {}), SNAPSHOT: session}
            fetch = [*fetch, SNAPSHOT]
        message = self._message(code, stdin, timeout, memory_mb, files or {}, fetch)
        message["job"]["session"] = session is not None
        begun = time.monotonic()
        result = await self._attempt(message)
        for attempt in range(RETRIES):
            if self._keeper.closed or not result.infrastructure:
                break
            await asyncio.sleep(backoff(attempt))
            result = _since(begun, await self._attempt(message))
        return result

    async def _attempt(self, message: dict[str, Any]) -> Result:
        """One try: a result, which is infrastructure's where the sandbox failed."""
        if self._keeper.connection.alive:
            submitted = self._submit(message)
        else:  # it is started first, which takes a while: not on the event loop
            submitted = await asyncio.to_thread(self._submit, message)
        connection, number, future = submitted
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
            if self._keeper.closed or not result.infrastructure:
                break
            time.sleep(backoff(attempt))
            result = _since(begun, self._submit(message)[2].result())
        return result

    def _submit(
        self, message: dict[str, Any]
    ) -> tuple[Connection, int, concurrent.futures.Future[Result]]:
        """Hand a call over: the connection that has it, its number there, and the future of its
        result.
        """
        problem = self._keeper.revive()
        if problem:
            future: concurrent.futures.Future[Result] = concurrent.futures.Future()
            future.set_result(Result("sandbox_error", reason=problem))
            return self._keeper.connection, -1, future
        connection = self._keeper.connection
        return connection, *connection.submit(message)

    def _message(
        self,
        code: str,
        stdin: str,
        timeout: float | None,
        memory_mb: int | None,
        files: Mapping[str, bytes],
        fetch: Sequence[str],
    ) -> dict[str, Any]:
        """A call as the supervisor reads it; ValueError for what can't be asked."""
        limits: dict[str, Any] = {}
        if timeout is not None:
            limits["wall_seconds"] = timeout
            # A longer wall time is of no use to a program that the kernel stops for its processor
            # time.
            limits["cpu_seconds"] = max(timeout, self.limits.cpu_seconds)
        if memory_mb is not None:
            limits["memory_mb"] = memory_mb
        if limits:
            replace(self.limits, **limits)  # refuses what would end the supervisor
        encoded = {
            name: base64.b64encode(content).decode("ascii")
            for name, content in safe_files(files, stdin, self.limits.file_mb).items()
        }
        job = {"code": strip_fence(code), "stdin": stdin, "files": encoded}
        return {"job": job, "limits": limits, "fetch": [safe_name(name) for name in fetch]}

    def close(self) -> None:
        """End every program and every process of the sandbox, and remove its files.

        Calls in flight get `sandbox_error`.
        """
        if not self._keeper.closed:
            self._keeper.close()
            atexit.unregister(self._at_exit)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_at_exit"):  # else construction failed half-way
            self.close()


def _since(begun: float, result: Result) -> Result:
    """The result with all that went by before its program started, lost attempts too, as time in
    the queue.
    """
    return replace(result, queue_seconds=time.monotonic() - begun - result.execution_time)


def _close(method: weakref.WeakMethod[Any]) -> None:
    close = method()
    if close is not None:
        close()
