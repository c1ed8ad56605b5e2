"""The process between the caller and the programs: queue, clock, verdicts.

It never runs a program and never forks after its start: the fork servers do. One loop, no threads.
The owner's socket is descriptor 0; when it closes, everything ends. Where there is a listener,
other processes call too: its guests.
"""

from __future__ import annotations

import collections
import gc
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from . import layers, probe, sharing, wire
from .cells import Call, Cell
from .events import Events
from .forkserver import servers_for
from .pool import Ended, Pool
from .result import Limits, Result

# A child's socket, pipes, folder and listener, and its slot's memory account; and all others, of
# which a few are enough where there must be few
DESCRIPTORS_PER_SLOT = 8
DESCRIPTORS = 256
FEWEST_DESCRIPTORS = 64
TICK_SECONDS = 0.05  # between two looks at what a call uses
NAMESPACES = frozenset(name for name in layers.LAYERS if name.endswith("_namespace"))


def main() -> NoReturn:
    """Serve the caller at descriptor 0 with the setup in the first argument."""
    setup = json.loads(sys.argv[1])
    owner = socket.socket(fileno=0)
    listener = None if setup["listener"] is None else socket.socket(fileno=setup["listener"])
    # Ctrl-C is the caller's to handle; it closes the socket
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # by way of the clean-up below
    # What a call leaves behind refers to nothing that refers to it: to look for that takes time
    gc.freeze()
    gc.set_threshold(100_000)
    events: Events[Ended] = Events()
    limits = Limits(**setup["limits"])
    pool = open_pool(
        owner,
        limits,
        workers=setup["workers"],
        servers=setup["servers"] or servers_for(setup["workers"]),
        without=frozenset(setup["without"]),
        strict=setup["isolation"] == "strict",
        events=events,
    )
    try:
        Supervisor(owner, listener, limits, pool, events).loop()
    finally:
        pool.stop()
    sys.exit(0)


def slots_for(workers: int) -> int:
    """As many wait confined as run, so that a call never waits for a fork; two more are on their
    way. Fewer where not so many files may be open, of which this asks for as many as that takes.
    """
    slots = 2 * workers + 2
    wanted = DESCRIPTORS + DESCRIPTORS_PER_SLOT * slots
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    most = (max(soft, wanted) - FEWEST_DESCRIPTORS) // DESCRIPTORS_PER_SLOT
    return max(1, min(slots, most))


def open_pool(
    caller: socket.socket,
    limits: Limits,
    *,
    workers: int,
    servers: int,
    without: frozenset[str],
    strict: bool,
    events: Events[Ended],
) -> Pool:
    """Find the layers and start the fork servers; where a guarantee has no mechanism, tell the
    caller and end.
    """
    slots = slots_for(workers)
    plan = probe.find(without, slots)
    if strict and plan.unmet():
        faults = [f"nothing here guarantees “{name}” ({why})" for name, why in plan.unmet().items()]
        _refuse(caller, "; ".join(faults))
    make_pool = partial(Pool, limits=limits, workers=workers, servers=servers, events=events)
    pool = make_pool(plan)
    try:
        pool.start_servers()
    except OSError as error:
        # Each layer worked alone and they don't work together: do without namespaces, if every
        # guarantee still holds.
        pool.stop()
        plan = probe.find(without | NAMESPACES, slots)
        if strict and plan.unmet():
            unmet = ", ".join(plan.unmet())
            _refuse(caller, f"{error}, and without namespaces nothing guarantees {unmet}")
        why = dict.fromkeys(NAMESPACES - without, str(error))
        pool = make_pool(replace(plan, missing={**plan.missing, **why}))
        pool.start_servers()
    return pool


def _refuse(caller: socket.socket, why: str) -> NoReturn:
    caller.sendall(wire.encode({"refused": why}))
    sys.exit(1)


class Caller:
    """A process that sends calls: its socket, what has arrived of the next message, and what it
    hasn't taken yet.
    """

    def __init__(
        self,
        connected: socket.socket,
        events: Events[Ended],
        heard: Callable[[Caller], Ended],
    ) -> None:
        connected.setblocking(False)
        self.alive = True
        self._socket = connected
        self._events = events
        self._frames = wire.Frames()
        self._unsent = bytearray()
        self._waits_for_room = False
        events.listen(connected.fileno(), lambda: heard(self))

    def receive(self) -> list[dict[str, Any]]:
        """The messages that are complete now; `alive` is False once it has hung up."""
        try:
            data = self._socket.recv(1 << 20)
            self.alive = bool(data)
        except BlockingIOError:
            data = b""
        except OSError:
            data = b""
            self.alive = False
        return self._frames.feed(data)

    def send(self, message: dict[str, Any]) -> None:
        if self.alive:
            self._unsent += wire.encode(message)
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes; the rest waits until it takes more."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent[: 1 << 18])]
        except BlockingIOError:
            pass
        except OSError:
            self.alive = False
        waits = bool(self._unsent) and self.alive
        if waits != self._waits_for_room:
            self._waits_for_room = waits
            self._events.listen_for_room(self._socket.fileno(), waits)

    def close(self) -> None:
        self._events.forget(self._socket.fileno())
        self._socket.close()


class Supervisor:
    """Calls in order of arrival, whoever makes them, and the conversation with those who do."""

    def __init__(
        self,
        owner: socket.socket,
        listener: socket.socket | None,
        limits: Limits,
        pool: Pool,
        events: Events[Ended],
    ) -> None:
        self._limits = limits
        self._pool = pool
        self._events = events
        self._listener = listener
        self._queue: collections.deque[Call] = collections.deque()
        self._next_look = 0.0
        self._first_end = math.inf  # when the time of the first call that runs is up
        self._next_listening: float | None = None
        self._next_refill: float | None = None
        self._owner = self._greet(owner)
        if listener is not None:
            listener.setblocking(False)
            listener.set_inheritable(False)
            events.listen(listener.fileno(), self._hear_guest)

    def _greet(self, connected: socket.socket) -> Caller:
        pool = self._pool
        caller = Caller(connected, self._events, self._hear_caller)
        facts = {
            "plan": pool.plan.to_json(),
            "unmet": pool.plan.unmet(),
            "servers": [server.pid for server in pool.servers.all if server.pid],
            "scratch": pool.scratch,
        }
        caller.send({"hello": {**facts, "pid": os.getpid()}})
        return caller

    def _hear_guest(self) -> Ended:
        assert self._listener is not None
        guest = sharing.accept(self._listener)
        if guest is not None:
            self._greet(guest)
        return []

    def loop(self) -> None:
        """Until the owner hangs up."""
        # Refill first: children get ready while the loop waits below.
        while self._owner.alive:
            self._next_refill = self._pool.refill()
            for listener in self._events.wait(self._patience()):
                self._answer(listener())
            self._watch()
            self._dispatch()

    def _patience(self) -> float | None:
        """Seconds until something has to be looked at; None: nothing runs."""
        now = time.monotonic()
        times = [self._next_refill or math.inf]
        if self._pool.running:
            times += [self._first_end, self._next_look, self._next_listening or math.inf]
        elif self._pool.brooms.busy():
            times.append(now + TICK_SECONDS)
        first = min(times)
        return None if first == math.inf else max(0.0, first - now)

    def _watch(self) -> None:
        """Clocks and accounts."""
        now = time.monotonic()
        self._next_listening = self._pool.listen_to_programs(now)
        looking = now >= self._next_look
        if looking:
            self._next_look = now + TICK_SECONDS
        if now >= self._first_end:
            self._hear_servers()
        if looking or now >= self._first_end:
            self._first_end = math.inf
            for cell in list(self._pool.running.values()):
                self._watch_cell(cell, now, looking)

    def _hear_servers(self) -> None:
        """Hear all that the fork servers have said, before a call is judged to take too long.

        Where this process is late, its program may have ended in time.
        """
        for server in self._pool.servers.all:
            # One that has died isn't among them any more
            while server in self._pool.servers.all and server.has_news():
                self._answer(self._pool.hear_server(server))

    def _watch_cell(self, cell: Cell, now: float, looking: bool) -> None:
        call = cell.call
        assert call is not None
        if call.verdict is not None:
            return
        if cell.overdue(now):
            reason = f"the program ran longer than {call.limits.wall_seconds:g} s"
            call.verdict = ("timeout", reason)
            cell.kill()
            return
        self._first_end = min(self._first_end, call.deadline)
        # A program that has just begun has used nothing yet: most calls end before anybody looks.
        if looking and now - call.started > TICK_SECONDS / 2:
            self._pool.look(cell)

    def _dispatch(self) -> None:
        while self._queue and self._pool.begin(self._queue[0]):
            call = self._queue.popleft()
            self._first_end = min(self._first_end, call.deadline)
        if self._pool.given_up:
            refusal = Result("sandbox_error", reason=self._pool.attempts.complaint)
            waiting = [(call, refusal) for call in self._queue]
            self._queue.clear()
            self._answer(waiting)

    def _hear_caller(self, caller: Caller) -> Ended:
        for message in caller.receive():
            if "cancel" in message:
                self._cancel(caller, message["cancel"])
                continue
            self._pool.revive()
            limits = self._limits
            if message["limits"]:
                limits = replace(limits, **message["limits"])
            self._queue.append(
                Call(message["id"], message["job"], limits, message["fetch"], caller)
            )
        caller.flush()
        if not caller.alive:
            self._cancel(caller, None)
            caller.close()
        return []

    def _cancel(self, caller: Caller, number: int | None) -> None:
        """The caller no longer waits for that call, or any: free the cell.

        The answer still goes out and is ignored.
        """

        def meant(call: Call) -> bool:
            return call.caller is caller and number in (None, call.number)

        for call in [call for call in self._queue if meant(call)]:
            self._queue.remove(call)
        for cell in self._pool.running.values():
            if cell.call is not None and meant(cell.call) and cell.call.verdict is None:
                cell.call.verdict = ("sandbox_error", "the call was cancelled")
                cell.kill()

    def _answer(self, ended: Ended) -> None:
        for call, result in ended:
            call.caller.send({"id": call.number, "result": result.to_json()})
