"""One child as the supervisor sees it: its pipes, its output, its use of resources, and the verdict
at its end.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from . import accounting, cgroups, program, wire
from .fetch import fetch_files
from .forkserver import ForkServer
from .result import Limits, Result, Status

READ_BYTES = 1 << 16
TIMEOUT_SLACK_SECONDS = 0.01  # for which a call isn't given more time
MAX_POSTPONEMENT = 3.0  # times its limit, that a call may be given for waiting for a processor
NOTHING = accounting.Usage(tasks=0, memory=0)


@dataclass
class Stream:
    """One output pipe: what is kept of it and how much there was.

    `last`: the end is kept, where a traceback says what went wrong.
    """

    fd: int
    last: bool = False
    kept: bytearray = field(default_factory=bytearray)
    total: int = 0
    open: bool = True

    def read(self, keep: int) -> bool:
        """Take what is there; False where there is nothing now."""
        try:
            data = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.open = False
            return False
        self.total += len(data)
        if self.last:
            self.kept += data
            del self.kept[: max(0, len(self.kept) - keep)]
        else:
            self.kept += data[: max(0, keep - len(self.kept))]
        return True

    def text(self) -> str:
        """Decoded; bytes that aren't UTF-8 become replacement characters."""
        return self.kept.decode("utf-8", "replace")


@dataclass
class Call:
    """A program that waits for a cell, or runs in one."""

    number: int
    job: dict[str, Any]
    limits: Limits
    fetch: list[str]
    caller: Any  # who is answered
    started: float = 0.0
    deadline: float = 0.0
    verdict: tuple[Status, str] | None = None  # set when the supervisor ends it


@dataclass(eq=False)
class Cell:
    """A child of a fork server.

    `pid` is the host's name for it, known once it is confined; `init` is that of the first process
    of its pid namespace, if it has one.
    """

    server: ForkServer
    number: int
    slot: int
    control: socket.socket
    out: Stream
    err: Stream
    path: str
    pid: int = 0
    init: int = 0
    folder: int = -1
    listener: int = -1
    buffers: int = 0  # bytes that socket pairs may hold, which no process's account shows
    call: Call | None = None
    group: cgroups.Group | None = None
    kills_before: int = 0
    waited_before: float = 0.0
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))  # of the program

    def start(self, call: Call, exact_tasks: bool) -> None:
        """The clock starts; `send` hands the program over."""
        limits = call.limits
        if self.group is not None:
            self.group.set_limit(limits.memory_mb << 20)
        self.call = call
        call.started = time.monotonic()
        call.deadline = call.started + limits.wall_seconds
        # What it waited for a processor while it was being made isn't the program's.
        self.waited_before = accounting.waited(self.pid)
        job = {
            **call.job,
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_mb << 20,
            "file_bytes": limits.file_mb << 20,
            "open_files": limits.open_files,
            "processes": limits.processes if exact_tasks else 0,
        }
        self.unsent = memoryview(wire.encode(job))

    def send(self) -> bool:
        """Send as much of the program as the child takes now, which may be late to read; whether
        that was all.
        """
        try:
            while self.unsent:
                self.unsent = self.unsent[self.control.send(self.unsent) :]
            self.control.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return False
        except OSError:  # it may be dying already: then its end tells
            pass
        return True

    def kill(self) -> None:
        """End the call and all its processes; the fork server tells when they are gone."""
        self.server.order({"kill": self.number})

    def overdue(self, now: float) -> bool:
        """Whether a running call has had its time, not counting what it waited for a processor."""
        if self.call is None or now < self.call.deadline:
            return False
        self._postpone()
        return now >= self.call.deadline - TIMEOUT_SLACK_SECONDS

    def _processes(self) -> list[int]:
        nested = self.server.nested
        heir = self.init if nested else self.server.pid
        return accounting.group_of(self.pid, heir, leads_group=not nested)

    def account(self, exact_tasks: bool, private: bool) -> None:
        """Set the verdict where the call's processes or its files go beyond a limit that the kernel
        doesn't hold by itself.

        `private`: the work folder is a mount of its own, which lies in memory.
        """
        assert self.call is not None
        limits = self.call.limits
        counted_by_kernel = self.group is not None and exact_tasks
        # Nothing to sum up: to read all that takes longer than the rest of a look
        usage = NOTHING if counted_by_kernel else self._usage()
        folder_in_account = self.group is not None and private
        file_bytes = 0 if folder_in_account else accounting.folder_bytes(self.folder, private)
        if self.group is not None:
            out_of_memory = self._killed_for_memory()  # the kernel ends one process, we the call
        else:
            used = usage.memory + self.buffers + (file_bytes if private else 0)
            out_of_memory = used > limits.memory_mb << 20
        if out_of_memory:
            self.call.verdict = _too_much_memory(limits)
        elif not private and file_bytes > limits.file_mb << 20:
            self.call.verdict = ("output_limit", f"the work folder outgrew {limits.file_mb} MB")
        elif not exact_tasks and usage.tasks > limits.processes:
            reason = f"the call ran more than {limits.processes} processes and threads"
            self.call.verdict = ("process_limit", reason)

    def _usage(self) -> accounting.Usage:
        return accounting.usage(self._processes(), self.server.inherited)

    def _killed_for_memory(self) -> bool:
        return self.group is not None and self.group.kills() > self.kills_before

    def _postpone(self) -> None:
        """Give the call the time that it waited for a processor: programs go last, and a busy host
        isn't their fault.
        """
        assert self.call is not None
        limit = self.call.limits.wall_seconds
        waited = max(accounting.waited(pid) for pid in self._processes()) - self.waited_before
        most = MAX_POSTPONEMENT * limit
        # One that has ended waits for its fork server to say so
        postponement = most if accounting.has_ended(self.pid) else min(max(0.0, waited), most)
        self.call.deadline = self.call.started + limit + postponement

    def flooded(self) -> bool:
        if self.call is None:
            return False
        return self.out.total + self.err.total > self.call.limits.flood_mb << 20

    def last_words(self) -> str:
        """What a child that never became a program wrote to stderr."""
        while self.err.open and self.err.read(1 << 12):
            continue
        return self.err.text()

    def finish(self, code: int, cpu: float, at: float) -> Result:
        """The result, once the kernel has reported the end: `code` is the exit code, or minus the
        signal; `cpu` are seconds; `at` is when it was, on the clock that all processes share.
        """
        assert self.call is not None
        call = self.call
        keep = call.limits.output_kb << 10
        # What the program wrote last is still in the pipes.
        for stream in (self.out, self.err):
            while stream.open and stream.read(keep):
                continue
        status, reason = self._judge(code, cpu)
        own_end = status in ("success", "error")
        return Result(
            status,
            self.out.text(),
            self.err.text(),
            return_code=code if own_end else None,
            execution_time=max(0.0, at - call.started),
            reason=reason,
            stdout_bytes=self.out.total,
            stderr_bytes=self.err.total,
            files=fetch_files(self.folder, call.fetch),
        )

    def _judge(self, code: int, cpu: float) -> tuple[Status, str]:
        """How the call ended: by the supervisor's verdict first, then by the kernel's, then by its
        own return code.
        """
        assert self.call is not None
        limits = self.call.limits
        if self.call.verdict is not None:
            return self.call.verdict
        if self._killed_for_memory():
            return _too_much_memory(limits)
        if code == program.OUT_OF_MEMORY:
            return "memory_limit", f"the program asked for more than its {limits.memory_mb} MB"
        cpu_limit = max(1, int(limits.cpu_seconds + 0.999))  # the kernel's are whole seconds
        # A program may end itself by these signals, too: the seconds that it took tell which it
        # was.
        if code in (-signal.SIGKILL, -signal.SIGXCPU) and cpu >= cpu_limit - 0.5:
            return "timeout", f"the program used up its {limits.cpu_seconds:g} s of CPU time"
        if code == 0:
            return "success", ""
        return "error", f"killed by {signal.Signals(-code).name}" if code < 0 else ""

    def close(self) -> None:
        self.control.close()
        for fd in (self.out.fd, self.err.fd, self.folder, self.listener):
            if fd >= 0:
                os.close(fd)


def _too_much_memory(limits: Limits) -> tuple[Status, str]:
    return "memory_limit", f"the call used more than {limits.memory_mb} MB"


def open_cell(server: ForkServer, number: int, slot: int, path: str) -> tuple[Cell, list[int]]:
    """A cell with its pipes, and the child's ends of them: control socket, stdout, stderr."""
    control, child_control = socket.socketpair()
    control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    control.setblocking(False)
    out, child_out = os.pipe2(os.O_CLOEXEC)
    err, child_err = os.pipe2(os.O_CLOEXEC)
    for reader in (out, err):
        os.set_blocking(reader, False)
    cell = Cell(server, number, slot, control, Stream(out), Stream(err, last=True), path)
    return cell, [child_control.detach(), child_out, child_err]
