"""The fork servers (`zygote`) as their supervisor sees them: processes, and a socket to each for
orders.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from . import accounting, spawn, wire
from .layers import Plan

WARM_SECONDS = 120  # that the first has to become ready
# A call keeps its fork server busy for 1.6 ms and other processors for three to four times as long
CORES_PER_SERVER = 4
MOST_SERVERS = 8  # a supervisor can't keep more of them busy


def servers_for(workers: int) -> int:
    """How many fork servers feed so many programs at once on the processors that are here."""
    busy = min(workers, len(os.sched_getaffinity(0)))
    return min(MOST_SERVERS, max(1, busy // CORES_PER_SERVER))


@dataclass(eq=False)
class ForkServer:
    """A warm interpreter that makes children.

    `nested`: each child has a pid namespace. `pid` is 0 until the server has said that it is warm.
    `inherited` are the bytes of private memory that each of its children shares with it. `asked`
    counts the children that it was asked for, `starting` those of them that aren't confined yet.
    """

    control: socket.socket
    nested: bool
    pid: int = 0
    inherited: int = 0
    asked: int = 0
    starting: int = 0

    def welcome(self, pid: int) -> None:
        """It is warm."""
        self.pid = pid
        self.inherited = accounting.private_memory(pid)

    def wait_until_warm(self) -> bool:
        """False where it ends before, or hangs."""
        self.control.settimeout(WARM_SECONDS)
        try:
            message, sender = self.receive()
        except TimeoutError:
            return False
        self.control.settimeout(None)
        if message is None:
            return False
        self.welcome(sender)
        return True

    def order(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        """Tell it what to do; nothing where it has gone, which `receive` notices."""
        with contextlib.suppress(OSError):
            socket.send_fds(self.control, [json.dumps(message).encode()], descriptors or [])

    def has_news(self) -> bool:
        """Whether `receive` wouldn't wait."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        return bool(poll.poll(0))

    def receive(self) -> tuple[dict[str, Any] | None, int]:
        """Its next message, None where it has died; and the pid of the process that it is about."""
        try:
            data, _, sender = wire.receive_with_credentials(self.control, 1 << 16)
        except ConnectionResetError:
            return None, 0
        return (json.loads(data), sender) if data else (None, 0)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end and the fork server's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # So that the kernel tells who sent a message, and under which pid we know that process
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


class ForkServers:
    """All fork servers of a supervisor: the first is exec'd and gets warm, the others are its
    twins.

    A twin is a fork of the first: it shares its memory, and is confined as it is. When the first
    ends, all end.
    """

    def __init__(self, plan: Plan, scratch: str, folder_mb: int, count: int) -> None:
        self._setup = {"plan": plan.to_json(), "scratch": scratch, "folder_mb": folder_mb}
        self._nested = "pid_namespace" in plan.present
        self._count = count
        # The first one's, or its guard's outside of the pid namespace
        self.process: subprocess.Popen[bytes] | None = None
        self.first: ForkServer | None = None
        self.twins: list[ForkServer] = []

    @property
    def all(self) -> list[ForkServer]:
        return [] if self.first is None else [self.first, *self.twins]

    def start(self) -> None:
        """Start all, and wait until they are warm; `OSError` where the first ends before that."""
        ours, theirs = _socket_pair()
        self.process = spawn.start("zygote", self._setup, theirs, path=sys.path)
        theirs.close()
        first = ForkServer(ours, self._nested)
        if not first.wait_until_warm():
            self.process.kill()
            code = self.process.wait()
            ours.close()
            raise OSError(f"the fork server ended with code {code} before it was ready")
        self.first = first
        # The first does the work of those that can't be had, too
        with contextlib.suppress(OSError):
            for _ in range(1, self._count):
                twin = self.add_twin()
                if not twin.wait_until_warm():
                    self.bury_twin(twin)

    def add_twin(self) -> ForkServer:
        """Ask for one more; it says when it is warm."""
        assert self.first is not None
        ours, theirs = _socket_pair()
        self.first.order({"twin": True}, [theirs.fileno()])
        theirs.close()
        twin = ForkServer(ours, self._nested)
        self.twins.append(twin)
        return twin

    def next(self) -> ForkServer:
        """Which one to ask for a child: the one that is the least behind, or else had the fewest to
        do so far.
        """
        warm = [server for server in self.all if server.pid]
        return min(warm, key=lambda server: (server.starting, server.asked))

    def bury_twin(self, twin: ForkServer) -> None:
        """Forget one that has died."""
        twin.control.close()
        self.twins.remove(twin)

    def bury(self) -> int:
        """Forget all, when the first has died; its exit code."""
        assert self.process is not None
        for server in self.all:
            server.control.close()
        self.first = None
        self.twins = []
        return self.process.wait()

    def stop(self) -> None:
        """End all, and with them every process in a pid namespace below them."""
        if self.first is None or self.process is None:
            return
        for server in self.all:
            server.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.process.kill()
        self.process.wait()
