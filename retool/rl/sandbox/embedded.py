"""The caller's side of the embedded backend: starts the sandbox's processes, hands calls over, brings results back."""

from __future__ import annotations

import asyncio
import atexit
import base64
import concurrent.futures
import contextlib
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from . import spawn, wire
from .layers import Plan
from .result import Limits, Result, safe_name

_FENCE = re.compile(r"\A\s*```(?:python|py|python3)?[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL | re.IGNORECASE)
_START_SECONDS = 180.0


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
        self.workers = workers or max(4, len(os.sched_getaffinity(0)))
        if self.workers < 1:
            raise ValueError(f"sandbox workers={workers} must be at least 1.")
        self._socket, theirs = socket.socketpair()
        setup = {"limits": vars(self.limits), "workers": self.workers, "without": sorted(without), "isolation": isolation}
        self._process = spawn.start("supervisor", setup, theirs, python, launcher)
        theirs.close()
        self._frames = wire.Frames()
        self._pending: dict[int, concurrent.futures.Future[Result]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._closed = False
        self._greet()
        self._reader = threading.Thread(target=_read_results, args=(weakref.ref(self), self._socket), name="sandbox", daemon=True)
        self._reader.start()
        self._at_exit = weakref.WeakMethod(self.close)
        atexit.register(_close, self._at_exit)

    def _greet(self) -> None:
        self._socket.settimeout(_START_SECONDS)
        messages: list[dict[str, Any]] = []
        while not messages:
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                data = b""
            if not data:
                self._process.kill()
                self._process.wait()
                raise RuntimeError("the sandbox's supervisor ended or hung before it was ready; its stderr says why.")
            messages = self._frames.feed(data)
        self._socket.settimeout(None)
        if "refused" in messages[0]:
            self._process.wait()
            self._socket.close()
            raise ValueError(
                f"sandbox.isolation=strict: {messages[0]['refused']} "
                "Run `python -m retool.rl.sandbox doctor` for the whole picture, or accept the risk with sandbox.isolation=best_effort."
            )
        hello = messages[0]["hello"]
        self.plan = Plan.from_json(hello["plan"])
        self.unmet: dict[str, str] = hello["unmet"]
        self.server_pid: int = hello["server"]
        self.scratch: str = hello["scratch"]
        if self.unmet:
            lost = ", ".join(self.unmet)
            print(f"SANDBOX WARNING: running WITHOUT: {lost}. Generated programs can do harm here.", file=sys.stderr, flush=True)

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._process.pid

    async def run(
        self, code: str, stdin: str = "", timeout: float | None = None, *,
        memory_mb: int | None = None, files: Mapping[str, bytes] | None = None, fetch: Sequence[str] = (),
    ) -> Result:  # fmt: skip
        """Run `code` and wait for its end without blocking the event loop.

        `timeout` in wall seconds and `memory_mb` replace the limits' own. `files` (relative path → content) are laid into the work
        folder first; `fetch` names files to bring back. Errors of the program are in the result; `ValueError` is for the caller's.
        Cancelling the task ends the program.
        """
        future, number = self._submit(code, stdin, timeout, memory_mb, files or {}, fetch)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._send({"cancel": number})
            raise

    def run_blocking(
        self, code: str, stdin: str = "", timeout: float | None = None, *,
        memory_mb: int | None = None, files: Mapping[str, bytes] | None = None, fetch: Sequence[str] = (),
    ) -> Result:  # fmt: skip
        """`run` for callers without an event loop."""
        return self._submit(code, stdin, timeout, memory_mb, files or {}, fetch)[0].result()

    def _submit(
        self, code: str, stdin: str, timeout: float | None, memory_mb: int | None, files: Mapping[str, bytes], fetch: Sequence[str]
    ) -> tuple[concurrent.futures.Future[Result], int]:
        limits = {} if timeout is None else {"wall_seconds": timeout, "cpu_seconds": max(timeout, self.limits.cpu_seconds)}
        limits |= {} if memory_mb is None else {"memory_mb": memory_mb}
        if any(not value > 0 for value in limits.values()):
            raise ValueError(f"timeout={timeout} and memory_mb={memory_mb} must be above 0.")
        encoded = {safe_name(name): base64.b64encode(content).decode("ascii") for name, content in files.items()}
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        number = next(self._numbers)
        message = {
            "id": number, "job": {"code": strip_fence(code), "stdin": stdin, "files": encoded}, "limits": limits,
            "fetch": [safe_name(name) for name in fetch],
        }  # fmt: skip
        self._pending[number] = future
        self._send(message)
        return future, number

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._socket.sendall(wire.encode(message))
        except OSError:
            self._fail("the sandbox is closed" if self._closed else "the sandbox's supervisor is gone")

    def _settle(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            future = self._pending.pop(message["id"], None)
            fields = message["result"]
            fields["files"] = {name: base64.b64decode(content) for name, content in fields["files"].items()}
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(Result(**fields))

    def _fail(self, reason: str) -> None:
        while self._pending:
            with contextlib.suppress(KeyError):
                future = self._pending.popitem()[1]
                if future.set_running_or_notify_cancel():
                    future.set_result(Result("sandbox_error", reason=reason))

    def close(self) -> None:
        """End every program and every process of the sandbox, and remove its files. Calls in flight get `sandbox_error`."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close()
        self._fail("the sandbox is closed")
        atexit.unregister(_close)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_closed", True) is False:
            self.close()


def _read_results(owner: weakref.ref[Sandbox], source: socket.socket) -> None:
    """The reader thread. It holds the sandbox weakly, so that forgetting a sandbox ends it."""
    while True:
        try:
            data = source.recv(1 << 20)
        except OSError:
            data = b""
        sandbox = owner()
        if sandbox is None:
            return
        if not data:
            sandbox._fail("the sandbox is closed" if sandbox._closed else "the sandbox's supervisor is gone")
            return
        sandbox._settle(data)
        del sandbox


def _close(method: weakref.WeakMethod[Any]) -> None:
    close = method()
    if close is not None:
        close()
