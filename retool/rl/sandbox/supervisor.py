"""The process between the caller and the programs: queue, clock, verdicts.

It never runs a program and never forks after its start: the fork server does. One loop, no threads. The caller's socket is
descriptor 0; when it closes, everything ends.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import selectors
import signal
import socket
import sys
import time
from dataclasses import replace
from typing import Any, NoReturn

from . import layers, probe, wire
from .cells import Call
from .pool import MOST_FAILURES, Ended, Pool
from .result import Limits, Result

TICK = 0.05  # seconds between two looks at what a call uses
NAMESPACES = frozenset(name for name in layers.LAYERS if name.endswith("_namespace"))


def main() -> NoReturn:
    """Serve the caller at descriptor 0 with the setup in the first argument."""
    setup = json.loads(sys.argv[1])
    caller = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle; it closes the socket
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # by way of the clean-up below
    select = selectors.DefaultSelector()
    limits = Limits(**setup["limits"])
    pool = open_pool(caller, limits, setup["workers"], frozenset(setup["without"]), setup["isolation"] == "strict", select)
    try:
        Supervisor(caller, limits, pool, select).loop()
    finally:
        pool.stop()
    sys.exit(0)


def open_pool(
    caller: socket.socket, limits: Limits, workers: int, without: frozenset[str], strict: bool, select: selectors.BaseSelector
) -> Pool:
    """Find the layers and start the fork server; where a guarantee has no mechanism, tell the caller and end."""
    slots = 2 * workers + 2
    plan = probe.find(without, slots)
    if strict and plan.unmet():
        _refuse(caller, "; ".join(f"nothing here guarantees “{name}” ({why})" for name, why in plan.unmet().items()))
    pool = Pool(plan, limits, workers, select)
    try:
        pool.start_server()
    except OSError as error:
        # Each layer worked alone and they don't work together: do without namespaces, if every guarantee still holds.
        pool.stop()
        plan = probe.find(without | NAMESPACES, slots)
        if strict and plan.unmet():
            _refuse(caller, f"{error}, and without namespaces nothing guarantees {', '.join(plan.unmet())}")
        pool = Pool(replace(plan, missing={**plan.missing, **dict.fromkeys(NAMESPACES - without, str(error))}), limits, workers, select)
        pool.start_server()
    return pool


def _refuse(caller: socket.socket, why: str) -> NoReturn:
    caller.sendall(wire.encode({"refused": why}))
    sys.exit(1)


class Supervisor:
    """Calls in order of arrival, and the conversation with the caller."""

    def __init__(self, caller: socket.socket, limits: Limits, pool: Pool, select: selectors.BaseSelector) -> None:
        self._caller, self._limits, self._pool, self._select = caller, limits, pool, select
        self._frames = wire.Frames()
        self._unsent = bytearray()
        self._queue: collections.deque[Call] = collections.deque()
        self._next_look = 0.0
        self._alive = True
        caller.setblocking(False)
        select.register(caller, selectors.EVENT_READ, self._hear_caller)
        hello = {"plan": pool.plan.to_json(), "unmet": pool.plan.unmet(), "server": pool.warm_pid, "scratch": pool.scratch}
        self._send({"hello": hello})

    def loop(self) -> None:
        """Until the caller hangs up."""
        while self._alive:
            self._pool.refill()
            for key, _ in self._select.select(self._patience()):
                if key.fileobj in self._select.get_map():  # an earlier event may have closed it
                    self._answer(key.data())
            self._watch()
            self._dispatch()

    def _patience(self) -> float | None:
        """Seconds until something has to be looked at; None: nothing runs."""
        sweeping = self._pool.sweeping()
        running = [cell.call for cell in self._pool.running() if cell.call is not None]
        if not running:
            return TICK if sweeping else None
        ends = min(call.started + call.limits.wall_seconds for call in running)
        return max(0.0, min(ends, self._next_look) - time.monotonic())

    def _watch(self) -> None:
        """Clocks and accounts."""
        now = time.monotonic()
        looking = now >= self._next_look
        if looking:
            self._next_look = now + TICK
        for cell in self._pool.running():
            call = cell.call
            if call is None or call.verdict is not None:
                continue
            if now >= call.started + call.limits.wall_seconds:
                call.verdict = ("timeout", f"the program ran longer than {call.limits.wall_seconds:g} s")
                self._pool.kill(cell)
            elif looking and now - call.started > TICK / 2:
                self._pool.look(cell)

    def _dispatch(self) -> None:
        while self._queue and self._pool.begin(self._queue[0]):
            self._queue.popleft()
        if self._pool.failures >= MOST_FAILURES:
            waiting = [(call, Result("sandbox_error", reason=self._pool.complaint)) for call in self._queue]
            self._queue.clear()
            self._answer(waiting)

    def _hear_caller(self) -> Ended:
        try:
            data = self._caller.recv(1 << 20)
            self._alive = bool(data)
        except BlockingIOError:
            data = b""
        except ConnectionResetError:
            data, self._alive = b"", False
        for message in self._frames.feed(data):
            if "cancel" in message:
                self._cancel(message["cancel"])
                continue
            self._pool.revive()
            limits = replace(self._limits, **message["limits"])
            self._queue.append(Call(message["id"], message["job"], limits, message["fetch"]))
        self._flush()
        return []

    def _cancel(self, number: int) -> None:
        """The caller no longer waits: free the cell. The answer still goes out and is ignored."""
        for call in [call for call in self._queue if call.number == number]:
            self._queue.remove(call)
        for cell in self._pool.running():
            if cell.call is not None and cell.call.number == number and cell.call.verdict is None:
                cell.call.verdict = ("sandbox_error", "the call was cancelled")
                self._pool.kill(cell)

    def _answer(self, ended: Ended) -> None:
        for call, result in ended:
            files = {name: base64.b64encode(content).decode() for name, content in result.files.items()}
            self._send({"id": call.number, "result": {**vars(result), "files": files}})

    def _send(self, message: dict[str, Any]) -> None:
        self._unsent += wire.encode(message)
        self._flush()

    def _flush(self) -> None:
        """Send what the caller's socket takes; the rest waits until it takes more."""
        try:
            while self._unsent:
                del self._unsent[: self._caller.send(self._unsent[: 1 << 18])]
        except BlockingIOError:
            pass
        except OSError:
            self._alive = False
        with contextlib.suppress(KeyError):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
            if self._select.get_key(self._caller).events != events:
                self._select.modify(self._caller, events, self._hear_caller)
