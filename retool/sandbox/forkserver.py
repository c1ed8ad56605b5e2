"""The fork server (`zygote`) as its supervisor sees it: a process, and a socket for orders."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from typing import Any

from . import accounting, spawn, wire
from .layers import Plan

WARM_SECONDS = 120  # that it has to become ready


class ForkServer:
    """One fork server after another: `start` makes the first, and the next where one has died.

    `process` is the one that was started last. `warm_pid` is that of the warm interpreter, which
    the programs are forks of, and `inherited` the bytes of private memory that each of them shares
    with it.
    """

    def __init__(self, plan: Plan, scratch: str, folder_mb: int) -> None:
        self._setup = {"plan": plan.to_json(), "scratch": scratch, "folder_mb": folder_mb}
        self._nested = "pid_namespace" in plan.present
        self.control: socket.socket | None = None  # None: none is running
        self.warm_pid = 0
        self.inherited = 0

    def start(self) -> socket.socket:
        """Start one and wait until it is warm; `OSError` where it ends first. Returns its socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = spawn.start("zygote", self._setup, theirs, path=sys.path)
        theirs.close()
        ours.settimeout(WARM_SECONDS)
        try:
            answer = ours.recv(1 << 16)
        except TimeoutError:
            self.process.kill()
            answer = b""
        if not answer:
            code = self.process.wait()
            ours.close()
            raise OSError(f"the fork server ended with code {code} before it was ready")
        ours.settimeout(None)
        # So that the kernel tells who sent a message, and under which pid we know that process
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.control = ours
        tree = accounting.group_of(self.process.pid, 0, leads_group=False)
        self.warm_pid = tree[1] if self._nested else self.process.pid
        self.inherited = accounting.private_memory(self.warm_pid)
        return ours

    def order(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        """Tell it what to do; nothing where it has gone, which `receive` notices."""
        if self.control is not None:
            with contextlib.suppress(OSError):
                socket.send_fds(self.control, [json.dumps(message).encode()], descriptors or [])

    def receive(self) -> tuple[dict[str, Any] | None, int]:
        """Its next message, None where it has died; and the pid of the process that it is about."""
        assert self.control is not None
        try:
            data, _, sender = wire.receive_with_credentials(self.control, 1 << 16)
        except ConnectionResetError:
            return None, 0
        return (json.loads(data), sender) if data else (None, 0)

    def bury(self) -> int:
        """Forget one that has died; its exit code."""
        assert self.control is not None
        self.control.close()
        self.control = None
        return self.process.wait()

    def stop(self) -> None:
        """End it, and with it every process in a pid namespace below it."""
        if self.control is None:
            return
        self.control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.process.kill()
        self.process.wait()
