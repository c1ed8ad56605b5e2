"""The fork server and its children as the supervisor holds them: started, waiting, running, gone."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

from . import accounting, cgroups, layers, listener, spawn, wire
from .cells import Call, Cell, Stream
from .result import Limits, Result
from .rootfs import sweep

MOST_FAILURES = 5
MOMENT = 0.01  # seconds for which a call isn't given more time

Ended = list[tuple[Call, Result]]


class Pool:
    """Cells by number.

    As many wait confined as may run at once, so that a call never waits for a fork.

    What happened is heard through `select`: each key's data is a function that returns the calls
    which ended by it.
    """

    def __init__(
        self, plan: layers.Plan, limits: Limits, workers: int, select: selectors.BaseSelector
    ) -> None:
        self.plan = plan
        self._limits = limits
        self._workers = workers
        self._select = select
        self.cells: dict[int, Cell] = {}
        self.failures = 0
        self.complaint = ""
        self._idle: collections.deque[Cell] = collections.deque()
        self._starting = 0
        self._free_slots = list(range(plan.slots))
        self._next_number = 0
        self.scratch = tempfile.mkdtemp(prefix="retool-sandbox-")
        os.chmod(self.scratch, 0o711)
        self._groups = cgroups.Groups(plan.cgroup) if plan.cgroup else None
        self._control: socket.socket | None = None
        self._brooms: list[subprocess.Popen[bytes]] = []
        self._pair_bytes = listener.pair_bytes()
        self._nested = "pid_namespace" in plan.present
        self._private = "mount_namespace" in plan.present

    def start_server(self) -> None:
        """Start it and wait until it is warm; `OSError` where it ends first."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        setup = {
            "plan": self.plan.to_json(),
            "scratch": self.scratch,
            "folder_mb": self._limits.file_mb,
        }
        self.server = spawn.start("zygote", setup, theirs, path=sys.path)
        theirs.close()
        ours.settimeout(120)
        try:
            answer = ours.recv(1 << 16)
        except TimeoutError:
            self.server.kill()
            answer = b""
        if not answer:
            self.server.wait()
            ours.close()
            raise OSError(
                f"the fork server ended with code {self.server.returncode} before it was ready"
            )
        ours.settimeout(None)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._control = ours
        tree = accounting.group_of(self.server.pid, 0, leads_group=False)
        self.warm_pid = tree[1] if self._nested else self.server.pid
        self._inherited = accounting.private_memory(self.warm_pid)
        self._select.register(ours, selectors.EVENT_READ, self._hear_server)

    def revive(self) -> None:
        """One more attempt after giving up, worth it for a new call."""
        if self.failures >= MOST_FAILURES:
            self.failures = MOST_FAILURES - 1
            if self._control is None:
                self._restart()

    def _restart(self) -> None:
        try:
            self.start_server()
        except OSError as error:
            self.failures, self.complaint = MOST_FAILURES, str(error)

    def _order(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        if self._control is not None:
            with contextlib.suppress(OSError):  # its end is noticed by _hear_server
                socket.send_fds(self._control, [json.dumps(message).encode()], descriptors or [])

    def stop(self) -> None:
        """End every process and remove every file."""
        if self._control is not None:
            self._control.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(timeout=5)
            self.server.kill()
            self.server.wait()
        for cell in self.cells.values():
            kill_group(cell, self._nested)
        if self._groups is not None:
            self._groups.remove()
        for broom in [*self._brooms, sweep(self.scratch)]:
            if broom is not None:
                broom.wait()

    def running(self) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.call is not None]

    def sweeping(self) -> bool:
        """Whether folders are still being removed; to be asked again until they aren't."""
        self._brooms = [broom for broom in self._brooms if broom.poll() is None]
        return bool(self._brooms)

    def refill(self) -> None:
        """Ask for children until enough of them wait."""
        if self._control is None or self.failures >= MOST_FAILURES:
            return
        while self._free_slots and len(self._idle) + self._starting < self._workers:
            self._request()

    def _request(self) -> None:
        self._next_number += 1
        self._starting += 1
        number = self._next_number
        slot = self._free_slots.pop(0)
        cell, theirs = open_cell(
            number, slot, "/box" if self._private else f"{self.scratch}/{number}"
        )
        self.cells[number] = cell
        self._order({"start": number, "slot": slot, "folder": cell.path}, theirs)
        for descriptor in theirs:
            os.close(descriptor)
        for stream in (cell.out, cell.err):
            self._select.register(
                stream.fd,
                selectors.EVENT_READ,
                lambda cell=cell, stream=stream: self._hear_program(cell, stream),
            )
        self._select.register(
            cell.control, selectors.EVENT_READ, lambda cell=cell: self._hear_cell(cell)
        )

    def begin(self, call: Call) -> bool:
        """Run `call` in a waiting cell; False where none waits or enough run."""
        if not self._idle or len(self.cells) - len(self._idle) - self._starting >= self._workers:
            return False
        cell = self._idle.popleft()
        if self._groups is not None:
            cell.group = self._groups.slot(cell.slot)
            cell.kills_before = cell.group.kills()
        cell.start(call, self.plan.exact_tasks)
        return True

    def overdue(self, cell: Cell, now: float) -> bool:
        """Whether a running call has had its time, not counting what it waited for a processor."""
        if cell.call is None or now < cell.call.deadline:
            return False
        cell.postpone(self._processes(cell))
        return now >= cell.call.deadline - MOMENT

    def _processes(self, cell: Cell) -> list[int]:
        heir = cell.init if self._nested else self.server.pid
        return accounting.group_of(cell.pid, heir, leads_group=not self._nested)

    def look(self, cell: Cell) -> None:
        """Compare what a running call uses with its limits, and end it where it goes beyond."""
        if self._nested and not cell.init:
            # Only calls that last are asked about: the next look knows
            self._order({"heir": cell.number})
        cell.account(self._processes(cell), self._inherited, self.plan.exact_tasks, self._private)
        if cell.call is not None and cell.call.verdict is not None:
            self.kill(cell)

    def kill(self, cell: Cell) -> None:
        """End a call and all its processes; `_hear_server` reports when they are gone."""
        self._order({"kill": cell.number})

    def _retire(self, cell: Cell) -> None:
        """Forget a child that is gone; its slot may be used again."""
        if cell in self._idle:
            self._idle.remove(cell)
        self._starting -= not cell.pid
        for fileobj in (cell.control, cell.out.fd, cell.err.fd, cell.listener):
            with contextlib.suppress(KeyError, ValueError):
                self._select.unregister(fileobj)
        cell.close()
        if not self._private and (broom := sweep(cell.path)) is not None:
            self._brooms.append(broom)
        del self.cells[cell.number]
        self._free_slots.append(cell.slot)

    def _hear_cell(self, cell: Cell) -> Ended:
        """A child is confined and says so, once, by handing over its work folder."""
        try:
            data, descriptors, pid = wire.receive_with_credentials(cell.control)
        except OSError:
            data = b""
            descriptors = []
            pid = 0
        self._select.unregister(cell.control)
        if data:
            cell.folder = descriptors[0]
            cell.pid = pid
            if len(descriptors) > 1:
                cell.listener = descriptors[1]
                self._select.register(
                    cell.listener, selectors.EVENT_READ, lambda: self._hear_question(cell)
                )
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
            cell.call.verdict = (
                "output_limit",
                f"the program wrote more than {limits.flood_mb} MB of output",
            )
            self.kill(cell)
        return []

    def _hear_server(self) -> Ended:
        assert self._control is not None
        try:
            data, _, sender = wire.receive_with_credentials(self._control, 1 << 16)
        except ConnectionResetError:
            data = b""
            sender = 0
        if not data:
            return self._server_died()
        message = json.loads(data)
        if "init" in message:
            if message["init"] in self.cells:
                self.cells[message["init"]].init = sender
            return []
        if "failed" in message:
            self._failed(
                self.cells[message["failed"]],
                f"the fork server could not start a process ({message['why']})",
            )
            return []
        cell = self.cells[message["exited"]]
        if cell.call is None:
            while cell.err.open and cell.err.read(1 << 12):
                continue
            self._failed(
                cell,
                f"a process could not be confined ({cell.err.text() or 'code ' + str(message['code'])})",
            )
            return []
        ended = (cell.call, cell.finish(message["code"], message["cpu"]))
        self._retire(cell)
        return [ended]

    def _failed(self, cell: Cell, why: str) -> None:
        self.failures += 1
        self.complaint = f"{why}, {self.failures} times in a row"
        self._retire(cell)

    def _server_died(self) -> Ended:
        """Every program went with it, or goes now; start another server."""
        assert self._control is not None
        self._select.unregister(self._control)
        self._control.close()
        self._control = None
        self.complaint = f"the fork server died (code {self.server.wait()})"
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


def open_cell(number: int, slot: int, path: str) -> tuple[Cell, list[int]]:
    """A cell with its pipes, and the child's ends of them: control socket, stdout, stderr."""
    control, child_control = socket.socketpair()
    control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    control.settimeout(10)
    out, child_out = os.pipe2(os.O_CLOEXEC)
    err, child_err = os.pipe2(os.O_CLOEXEC)
    for reader in (out, err):
        os.set_blocking(reader, False)
    return Cell(number, slot, control, Stream(out), Stream(err, last=True), path), [
        child_control.detach(),
        child_out,
        child_err,
    ]


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
        cell.call.verdict = (
            "memory_limit",
            f"the call used more than {most} MB, in buffers of socket pairs",
        )
    return False


def kill_group(cell: Cell, nested: bool) -> None:
    """Without a pid namespace the server's end isn't the programs' end."""
    if cell.pid and not nested:
        with contextlib.suppress(OSError):
            os.killpg(cell.pid, signal.SIGKILL)
