"""The cells of a supervisor: asked for, waiting, running, gone."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import signal
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import accounting, cgroups, listener, shortage, wire
from .cells import Call, Cell, Stream, open_cell
from .events import Events
from .forkserver import ForkServer, ForkServers
from .layers import Plan
from .result import Limits, Result
from .rootfs import Brooms

# Of running, before what a program writes is read: most have ended by then, and all that they wrote
# is in the pipes. A program that writes more than the pipes hold waits as long, once.
LISTEN_SECONDS = 0.02
MOST_FAILURES = 5  # in a row, after which no more children are asked for where none is there
# After the first failure in a row; after each further one twice as long, up to the last
RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 1.0
GONE_SECONDS = 2.0  # that killed processes have to be gone in

Ended = list[tuple[Call, Result]]


@dataclass
class Attempts:
    """To make children, or a server: how many have failed in a row, what is said about the last of
    them, and when the next may be made.
    """

    failures: int = 0
    complaint: str = ""
    next_at: float = 0.0

    @property
    def enough(self) -> bool:
        return self.failures >= MOST_FAILURES

    def fail(self, why: str) -> None:
        """What was asked for at once and fails at once is one failure."""
        now = time.monotonic()
        self.complaint = why
        if now >= self.next_at:
            wait = min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2**self.failures)
            self.next_at = now + wait
            self.failures += 1

    def fail_for_good(self, why: str) -> None:
        self.failures = MOST_FAILURES
        self.complaint = why

    def once_more(self) -> None:
        self.failures = MOST_FAILURES - 1
        self.next_at = 0.0


class Pool:
    """Cells by number.

    As many wait confined as may run at once, so that a call never waits for a fork.

    What happened is heard through `events`, whose functions return the calls that ended by it.
    """

    def __init__(
        self,
        plan: Plan,
        limits: Limits,
        *,
        workers: int,
        servers: int,
        events: Events[Ended],
    ) -> None:
        self.plan = plan
        self.scratch = tempfile.mkdtemp(prefix="retool-sandbox-")
        # Programs run under users of their own: they must pass through this folder, not list it
        os.chmod(self.scratch, 0o711)
        self.servers = ForkServers(plan, self.scratch, limits.file_mb, servers)
        self.cells: dict[int, Cell] = {}
        self.running: dict[int, Cell] = {}
        self.brooms = Brooms()
        self.attempts = Attempts()
        self._limits = limits
        self._workers = workers
        self._events = events
        self._idle: collections.deque[Cell] = collections.deque()
        # Those running that aren't listened to yet, in the order of their begin, and some that ended
        self._fresh: collections.deque[Cell] = collections.deque()
        self._starting = 0
        self._free_slots = list(range(plan.slots))
        self._last_number = 0
        self._groups = cgroups.Groups(plan.cgroup) if plan.cgroup else None
        self._pair_bytes = listener.pair_bytes()
        self._private = "mount_namespace" in plan.present

    # --- the fork servers ---

    def start_servers(self) -> None:
        """Start them and wait until they are warm; `OSError` where the first ends before that."""
        self.servers.start()
        for server in self.servers.all:
            self._listen_to(server)

    @property
    def given_up(self) -> bool:
        """Whether no child is there and none can be made."""
        return self.attempts.enough and not self.cells

    def revive(self) -> None:
        """One more attempt after giving up, worth it for a new call."""
        if self.given_up:
            self.attempts.once_more()
            if self.servers.first is None:
                self._restart()

    def _restart(self) -> None:
        try:
            self.start_servers()
        except OSError as error:
            self.attempts.fail_for_good(shortage.told(error))

    def stop(self) -> None:
        """End every process and remove every file."""
        self.servers.stop()
        for cell in self.cells.values():
            kill_group(cell)
        if self._groups is not None:
            self._groups.remove()
        self.brooms.sweep(self.scratch)
        self.brooms.wait()

    # --- cells, from the first to the last ---

    def refill(self) -> float | None:
        """Ask for children until enough of them wait; when to do it again, where some failed."""
        if self.servers.first is None or self.given_up:
            return None
        while self._free_slots and len(self._idle) + self._starting < self._workers:
            if time.monotonic() < self.attempts.next_at:
                return self.attempts.next_at
            self._request()
        return None

    def _request(self) -> None:
        """Ask for one child; `_hear_cell` hears when it is confined."""
        self._last_number += 1
        self._starting += 1
        number = self._last_number
        slot = self._free_slots.pop(0)
        path = "/box" if self._private else f"{self.scratch}/{number}"
        server = self.servers.next()
        server.asked += 1
        server.starting += 1
        cell, theirs = open_cell(server, number, slot, path)
        self.cells[number] = cell
        entrance = []
        if self._groups is not None:
            cell.group = self._groups.slot(slot)
            cell.group.set_limit(self._limits.memory_mb << 20)
            entrance = [cell.group.entrance]
        message = {"start": number, "slot": slot, "folder": cell.path}
        server.order(message, [*theirs, *entrance])
        # The server has its copies. These must go, or a pipe would never end with its program.
        for descriptor in theirs:
            os.close(descriptor)
        # A child says one thing on this socket. What comes later on it is for the child.
        self._events.listen(cell.control.fileno(), partial(self._hear_cell, cell), once=True)

    def begin(self, call: Call) -> bool:
        """Run `call` in a waiting cell; False where none waits or enough run."""
        running = len(self.cells) - len(self._idle) - self._starting
        if not self._idle or running >= self._workers:
            return False
        cell = self._idle.popleft()
        if cell.group is not None:
            cell.kills_before = cell.group.kills()
        cell.start(call, self.plan.exact_tasks)
        self.running[cell.number] = cell
        self._fresh.append(cell)
        if not cell.send():
            self._events.instead(cell.control.fileno(), partial(self._send, cell), select.EPOLLOUT)
        return True

    def listen_to_programs(self, now: float) -> float | None:
        """Begin to read what programs write that have run for a while; when to do it again."""
        while self._fresh:
            cell = self._fresh[0]
            if cell.number in self.running:
                assert cell.call is not None
                due = cell.call.started + LISTEN_SECONDS
                if now < due:
                    return due
                for stream in (cell.out, cell.err):
                    self._events.listen(stream.fd, partial(self._hear_program, cell, stream))
            self._fresh.popleft()
        return None

    def look(self, cell: Cell) -> None:
        """Compare what a running call uses with its limits, and end it where it goes beyond."""
        if cell.server.nested and not cell.init:
            # Only calls that last are asked about: the next look knows
            cell.server.order({"heir": cell.number})
        cell.account(self.plan.exact_tasks, self._private)
        if cell.call is not None and cell.call.verdict is not None:
            cell.kill()

    def _retire(self, cell: Cell) -> None:
        """Forget a child that is gone; its slot may be used again."""
        if cell in self._idle:
            self._idle.remove(cell)
        if not cell.pid:
            self._starting -= 1
            cell.server.starting -= 1
        for fd in (cell.control.fileno(), cell.out.fd, cell.err.fd, cell.listener):
            self._events.forget_closed(fd)
        cell.close()
        if not self._private:
            self.brooms.sweep(cell.path)
        del self.cells[cell.number]
        self.running.pop(cell.number, None)
        self._free_slots.append(cell.slot)

    # --- what is heard: of a child, of its program, of the fork server ---

    def _listen_to(self, server: ForkServer) -> None:
        self._events.listen(server.control.fileno(), partial(self.hear_server, server))

    def _hear_cell(self, cell: Cell) -> Ended:
        """A child is confined and says so, once, by handing over its work folder."""
        try:
            data, descriptors, pid = wire.receive_with_credentials(cell.control)
        except OSError:
            return []
        if not data:
            return []
        cell.folder = descriptors[0]
        cell.pid = pid
        if len(descriptors) > 1:
            cell.listener = descriptors[1]
            self._events.listen(cell.listener, partial(self._hear_question, cell))
        self._starting -= 1
        cell.server.starting -= 1
        self.attempts.failures = 0
        self._idle.append(cell)
        return []

    def _send(self, cell: Cell) -> Ended:
        """A child takes more of its program."""
        if cell.send():
            self._events.forget(cell.control.fileno())
        return []

    def _hear_question(self, cell: Cell) -> Ended:
        """A program's filter asks about a system call, which waits."""
        if not listener.answer(
            cell.listener, lambda question: allowed(cell, question, self._limits, self._pair_bytes)
        ):
            self._events.forget(cell.listener)
        if cell.call is not None and cell.call.verdict is not None:
            cell.kill()
        return []

    def _hear_program(self, cell: Cell, stream: Stream) -> Ended:
        limits = cell.call.limits if cell.call is not None else self._limits
        stream.read(limits.output_kb << 10)
        if not stream.open:
            self._events.forget(stream.fd)
        elif cell.flooded() and cell.call is not None and cell.call.verdict is None:
            reason = f"the program wrote more than {limits.flood_mb} MB of output"
            cell.call.verdict = ("output_limit", reason)
            cell.kill()
        return []

    def hear_server(self, server: ForkServer) -> Ended:
        message, sender = server.receive()
        if message is None:
            return self._server_died(server)
        if "ready" in message:
            server.welcome(sender)
            return []
        if "init" in message:
            if (cell := self.cells.get(message["init"])) is not None:
                cell.init = sender
            return []
        if "failed" in message:
            why = f"the fork server could not start a process ({message['why']})"
            self.attempts.fail(why)
            self._retire(self.cells[message["failed"]])
            return []
        return self._child_ended(self.cells[message["exited"]], message)

    def _child_ended(self, cell: Cell, message: dict[str, Any]) -> Ended:
        """A program and all that it had started has ended, or a child that never became one."""
        if cell.call is not None:
            ended = [(cell.call, cell.finish(message["code"], message["cpu"], message["at"]))]
            self._retire(cell)
            self.attempts.next_at = 0.0  # where something ran short, there is more of it now
            return ended
        reason = cell.last_words() or f"code {message['code']}"
        self.attempts.fail(f"a process could not be confined ({reason})")
        self._retire(cell)
        return []

    def _server_died(self, server: ForkServer) -> Ended:
        """Every program of it went with it, or goes now; start another.

        With the first of them its twins went, too.
        """
        first = server is self.servers.first
        lost = self.servers.all if first else [server]
        for each in lost:
            self._events.forget(each.control.fileno())
        why = "a fork server died"
        if first:
            why = f"the fork server died (code {self.servers.bury()})"
            self.attempts.fail(why)
        else:
            self.servers.bury_twin(server)
        ended = self._abandon(lost, why)
        if first and not self.attempts.enough:
            self._restart()
        elif not first and server.pid:  # one that never got warm wouldn't now
            with contextlib.suppress(OSError):  # without it the others do its work
                self._listen_to(self.servers.add_twin())
        return ended

    def _abandon(self, servers: list[ForkServer], why: str) -> Ended:
        """Forget the cells of fork servers that have died, once their processes are gone."""
        cells = [cell for cell in self.cells.values() if cell.server in servers]
        end_processes(servers, cells)
        ended = []
        for cell in cells:
            if cell.call is not None:
                ended.append((cell.call, Result("sandbox_error", reason=why)))
            self._retire(cell)
        return ended


def end_processes(servers: list[ForkServer], cells: list[Cell]) -> None:
    """Wait until nothing is left of fork servers that have died, and of their cells; not for what
    takes longer than `GONE_SECONDS`.

    Another call may use a slot at once: its user and its memory account are to be nobody's by then.
    """
    for cell in cells:
        kill_group(cell)
    end = time.monotonic() + GONE_SECONDS
    # A server isn't gone before all that is in its pid namespace.
    for pid in [server.pid for server in servers] + [cell.pid for cell in cells]:
        while pid and os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
            time.sleep(0.001)


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


def kill_group(cell: Cell) -> None:
    """Without a pid namespace the server's end isn't the programs' end."""
    if cell.pid and not cell.server.nested:
        with contextlib.suppress(OSError):
            os.killpg(cell.pid, signal.SIGKILL)
