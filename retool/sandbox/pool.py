"""The cells of a supervisor: asked for, waiting, running, gone."""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from . import accounting, cgroups, listener, wire
from .cells import Call, Cell, Stream, open_cell
from .forkserver import ForkServer
from .layers import Plan
from .result import Limits, Result
from .rootfs import sweep

MOST_FAILURES = 5  # in a row, after which no more children are asked for
TIMEOUT_SLACK_SECONDS = 0.01  # for which a call isn't given more time

Ended = list[tuple[Call, Result]]


class Pool:
    """Cells by number.

    As many wait confined as may run at once, so that a call never waits for a fork.

    What happened is heard through `select`: each key's data is a function that returns the calls
    which ended by it.
    """

    def __init__(
        self, plan: Plan, limits: Limits, workers: int, select: selectors.BaseSelector
    ) -> None:
        self.plan = plan
        self.scratch = tempfile.mkdtemp(prefix="retool-sandbox-")
        # Programs run under users of their own: they must pass through this folder, and not list
        # it.
        os.chmod(self.scratch, 0o711)
        self.server = ForkServer(plan, self.scratch, limits.file_mb)
        self.cells: dict[int, Cell] = {}
        self.failures = 0  # in a row, to make a child or a server
        self.complaint = ""  # about the last of them
        self._limits = limits
        self._workers = workers
        self._select = select
        self._idle: collections.deque[Cell] = collections.deque()
        self._starting = 0
        self._free_slots = list(range(plan.slots))
        self._last_number = 0
        self._groups = cgroups.Groups(plan.cgroup) if plan.cgroup else None
        self._brooms: list[subprocess.Popen[bytes]] = []
        self._pair_bytes = listener.pair_bytes()
        self._nested = "pid_namespace" in plan.present
        self._private = "mount_namespace" in plan.present

    # --- the fork server ---

    def start_server(self) -> None:
        """Start it and wait until it is warm; `OSError` where it ends first."""
        control = self.server.start()
        self._listen(control, self._hear_server)

    def revive(self) -> None:
        """One more attempt after giving up, worth it for a new call."""
        if self.failures >= MOST_FAILURES:
            self.failures = MOST_FAILURES - 1
            if self.server.control is None:
                self._restart()

    def _restart(self) -> None:
        try:
            self.start_server()
        except OSError as error:
            self.failures = MOST_FAILURES
            self.complaint = str(error)

    def stop(self) -> None:
        """End every process and remove every file."""
        self.server.stop()
        for cell in self.cells.values():
            kill_group(cell, self._nested)
        if self._groups is not None:
            self._groups.remove()
        for broom in [*self._brooms, sweep(self.scratch)]:
            if broom is not None:
                broom.wait()

    # --- cells, from the first to the last ---

    def refill(self) -> None:
        """Ask for children until enough of them wait."""
        if self.server.control is None or self.failures >= MOST_FAILURES:
            return
        while self._free_slots and len(self._idle) + self._starting < self._workers:
            self._request()

    def _request(self) -> None:
        """Ask for one child; `_hear_cell` hears when it is confined."""
        self._last_number += 1
        self._starting += 1
        number = self._last_number
        slot = self._free_slots.pop(0)
        path = "/box" if self._private else f"{self.scratch}/{number}"
        cell, theirs = open_cell(number, slot, path)
        self.cells[number] = cell
        self.server.order({"start": number, "slot": slot, "folder": cell.path}, theirs)
        # The server has its copies. These must go, or a pipe would never end with its program.
        for descriptor in theirs:
            os.close(descriptor)
        for stream in (cell.out, cell.err):
            self._listen(stream.fd, partial(self._hear_program, cell, stream))
        self._listen(cell.control, partial(self._hear_cell, cell))

    def begin(self, call: Call) -> bool:
        """Run `call` in a waiting cell; False where none waits or enough run."""
        running = len(self.cells) - len(self._idle) - self._starting
        if not self._idle or running >= self._workers:
            return False
        cell = self._idle.popleft()
        if self._groups is not None:
            cell.group = self._groups.slot(cell.slot)
            cell.kills_before = cell.group.kills()
        cell.start(call, self.plan.exact_tasks)
        return True

    def running(self) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.call is not None]

    def overdue(self, cell: Cell, now: float) -> bool:
        """Whether a running call has had its time, not counting what it waited for a processor."""
        if cell.call is None or now < cell.call.deadline:
            return False
        cell.postpone(self._processes(cell))
        return now >= cell.call.deadline - TIMEOUT_SLACK_SECONDS

    def look(self, cell: Cell) -> None:
        """Compare what a running call uses with its limits, and end it where it goes beyond."""
        if self._nested and not cell.init:
            # Only calls that last are asked about: the next look knows
            self.server.order({"heir": cell.number})
        cell.account(
            self._processes(cell), self.server.inherited, self.plan.exact_tasks, self._private
        )
        if cell.call is not None and cell.call.verdict is not None:
            self.kill(cell)

    def _processes(self, cell: Cell) -> list[int]:
        heir = cell.init if self._nested else self.server.process.pid
        return accounting.group_of(cell.pid, heir, leads_group=not self._nested)

    def kill(self, cell: Cell) -> None:
        """End a call and all its processes; `_hear_server` reports when they are gone."""
        self.server.order({"kill": cell.number})

    def _retire(self, cell: Cell) -> None:
        """Forget a child that is gone; its slot may be used again."""
        if cell in self._idle:
            self._idle.remove(cell)
        self._starting -= not cell.pid
        for fileobj in (cell.control, cell.out.fd, cell.err.fd, cell.listener):
            with contextlib.suppress(KeyError, ValueError):
                self._select.unregister(fileobj)
        cell.close()
        broom = None if self._private else sweep(cell.path)
        if broom is not None:
            self._brooms.append(broom)
        del self.cells[cell.number]
        self._free_slots.append(cell.slot)

    def sweeping(self) -> bool:
        """Whether folders are still being removed; to be asked again until they aren't."""
        self._brooms = [broom for broom in self._brooms if broom.poll() is None]
        return bool(self._brooms)

    # --- what is heard: of a child, of its program, of the fork server ---

    def _listen(self, source: socket.socket | int, heard: Callable[[], Ended]) -> None:
        self._select.register(source, selectors.EVENT_READ, heard)

    def _hear_cell(self, cell: Cell) -> Ended:
        """A child is confined and says so, once, by handing over its work folder."""
        try:
            data, descriptors, pid = wire.receive_with_credentials(cell.control)
        except OSError:
            data = b""
            descriptors = []
            pid = 0
        # A child says one thing on this socket. What comes later on it is for the child, not from
        # it.
        self._select.unregister(cell.control)
        if not data:
            return []
        cell.folder = descriptors[0]
        cell.pid = pid
        if len(descriptors) > 1:
            cell.listener = descriptors[1]
            self._listen(cell.listener, partial(self._hear_question, cell))
        self._starting -= 1
        if self._groups is not None:
            group = self._groups.slot(cell.slot)
            group.set_limit(self._limits.memory_mb << 20)
            with contextlib.suppress(ProcessLookupError):
                group.add(pid)
        self.failures = 0
        self._idle.append(cell)
        return []

    def _hear_question(self, cell: Cell) -> Ended:
        """A program's filter asks about a system call, which waits."""
        if not listener.answer(
            cell.listener, lambda question: allowed(cell, question, self._limits, self._pair_bytes)
        ):
            self._select.unregister(cell.listener)
        if cell.call is not None and cell.call.verdict is not None:
            self.kill(cell)
        return []

    def _hear_program(self, cell: Cell, stream: Stream) -> Ended:
        limits = cell.call.limits if cell.call is not None else self._limits
        stream.read(limits.output_kb << 10)
        if not stream.open:
            self._select.unregister(stream.fd)
        elif cell.flooded() and cell.call is not None and cell.call.verdict is None:
            reason = f"the program wrote more than {limits.flood_mb} MB of output"
            cell.call.verdict = ("output_limit", reason)
            self.kill(cell)
        return []

    def _hear_server(self) -> Ended:
        message, sender = self.server.receive()
        if message is None:
            return self._server_died()
        if "init" in message:
            if message["init"] in self.cells:
                self.cells[message["init"]].init = sender
            return []
        if "failed" in message:
            why = f"the fork server could not start a process ({message['why']})"
            self._child_failed(self.cells[message["failed"]], why)
            return []
        return self._child_ended(self.cells[message["exited"]], message)

    def _child_ended(self, cell: Cell, message: dict[str, Any]) -> Ended:
        """A program has ended, and everything that it had started; or a child that never became
        one.
        """
        if cell.call is not None:
            ended = (cell.call, cell.finish(message["code"], message["cpu"]))
            self._retire(cell)
            return [ended]
        # A child that never became a program wrote to stderr why.
        while cell.err.open and cell.err.read(1 << 12):
            continue
        reason = cell.err.text() or f"code {message['code']}"
        self._child_failed(cell, f"a process could not be confined ({reason})")
        return []

    def _child_failed(self, cell: Cell, why: str) -> None:
        self.failures += 1
        self.complaint = f"{why}, {self.failures} times in a row"
        self._retire(cell)

    def _server_died(self) -> Ended:
        """Every program went with it, or goes now; start another server."""
        assert self.server.control is not None
        self._select.unregister(self.server.control)
        self.complaint = f"the fork server died (code {self.server.bury()})"
        self.failures += 1
        ended = []
        for cell in list(self.cells.values()):
            kill_group(cell, self._nested)
            if cell.call is not None:
                ended.append((cell.call, Result("sandbox_error", reason=self.complaint)))
            self._retire(cell)
        if self.failures < MOST_FAILURES:
            self._restart()
        return ended


def allowed(cell: Cell, question: listener.Question, limits: Limits, pair_bytes: int) -> bool:
    """Socket pairs while their buffers fit into the call's memory, else the call is over; signals
    to the call's own processes.
    """
    if question.call != "socketpair":
        return accounting.process_group(question.target) == cell.pid
    cell.buffers += pair_bytes
    most = (cell.call.limits if cell.call is not None else limits).memory_mb
    if cell.buffers <= most << 20:
        return True
    if cell.call is not None and cell.call.verdict is None:
        reason = f"the call used more than {most} MB, in buffers of socket pairs"
        cell.call.verdict = ("memory_limit", reason)
    return False


def kill_group(cell: Cell, nested: bool) -> None:
    """Without a pid namespace the server's end isn't the programs' end."""
    if cell.pid and not nested:
        with contextlib.suppress(OSError):
            os.killpg(cell.pid, signal.SIGKILL)
