"""The process between the caller and the programs: queue, clock, pipes, accounts, verdicts.

It never runs a program and never forks after its start: the fork server does. One loop, no threads. The caller's socket is
descriptor 0; when it closes, everything ends.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any, NoReturn

from . import accounting, cgroups, layers, spawn, wire
from .cells import Call, Cell, Stream
from .result import Limits, Result

TICK = 0.05
MOST_FAILURES = 5
NAMESPACES = frozenset(name for name in layers.LAYERS if name.endswith("_namespace"))


def main() -> NoReturn:
    """Serve the caller at descriptor 0 with the setup in the first argument."""
    setup = json.loads(sys.argv[1])
    caller = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle; it closes the socket
    supervisor = Supervisor(caller, Limits(**setup["limits"]), setup["workers"])
    supervisor.start(frozenset(setup["without"]), setup["isolation"] == "strict")
    try:
        supervisor.loop()
    finally:
        supervisor.stop()
    sys.exit(0)


class Supervisor:
    """Cells by number, calls in order of arrival."""

    def __init__(self, caller: socket.socket, limits: Limits, workers: int) -> None:
        self._caller, self._limits, self._workers = caller, limits, workers
        self._slots = 2 * workers + 2
        self._frames = wire.Frames()
        self._unsent = bytearray()
        self._queue: collections.deque[Call] = collections.deque()
        self._cells: dict[int, Cell] = {}
        self._idle: collections.deque[Cell] = collections.deque()
        self._free_slots = list(range(self._slots))
        self._select = selectors.DefaultSelector()
        self._next_cell = self._failures = self._inherited = self._next_tick = 0
        self._complaint = ""
        self._groups: cgroups.Groups | None = None
        self._scratch = tempfile.mkdtemp(prefix="retool-sandbox-")
        os.chmod(self._scratch, 0o711)
        self._alive = True

    # -- start and end -------------------------------------------------------------------------------------------------------

    def start(self, without: frozenset[str], strict: bool) -> None:
        """Find the layers, start the fork server, tell the caller what holds; refuse where a guarantee has no mechanism."""
        self.plan = layers.find(without, self._slots)
        unmet = self.plan.unmet()
        if unmet and strict:
            self._refuse("; ".join(f"nothing here guarantees “{name}” ({why})" for name, why in unmet.items()))
        try:
            self._start_server()
        except OSError as error:
            # Each layer worked alone and they don't work together: do without namespaces, if every guarantee still holds.
            self.plan = layers.find(without | NAMESPACES, self._slots)
            if self.plan.unmet() and strict:
                self._refuse(f"the fork server doesn't start ({error}), and without namespaces {', '.join(self.plan.unmet())} would be lost")
            self._start_server()
        if self.plan.cgroup:
            self._groups = cgroups.Groups(self.plan.cgroup)
        self._exact_tasks = "user_namespace" in self.plan.present or bool(self.plan.first_uid)
        self._caller.setblocking(False)
        self._select.register(self._caller, selectors.EVENT_READ, self._hear_caller)
        self._refill()
        self._send({"hello": {"plan": self.plan.to_json(), "unmet": self.plan.unmet(), "server": self._server.pid, "scratch": self._scratch}})

    def _refuse(self, why: str) -> NoReturn:
        self._caller.sendall(wire.encode({"refused": why}))
        self.stop()
        sys.exit(1)

    def _start_server(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        setup = {"plan": self.plan.to_json(), "scratch": self._scratch, "folder_mb": self._limits.file_mb}
        self._server = spawn.start("zygote", setup, theirs, path=sys.path)
        theirs.close()
        ours.settimeout(120)
        answer = ours.recv(1 << 16)
        if not answer:
            self._server.wait()
            ours.close()
            raise OSError(f"the fork server ended with code {self._server.returncode} before it was ready")
        ours.settimeout(None)
        self._control = ours
        self._inherited = accounting.private_memory(self._warm_process())
        self._select.register(ours, selectors.EVENT_READ, self._hear_server)

    def _warm_process(self) -> int:
        """The host's pid of the process that forks the children: the server itself, or its child in a pid namespace."""
        inner = accounting.group_of(self._server.pid, 0, leads_group=False)
        return inner[1] if len(inner) > 1 else self._server.pid

    def stop(self) -> None:
        """End every process and remove every file of this sandbox."""
        if hasattr(self, "_control"):
            with contextlib.suppress(OSError):
                self._control.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(timeout=5)
            self._server.kill()
            self._server.wait()
        for cell in self._cells.values():
            self._kill_group(cell)
        if self._groups is not None:
            self._groups.remove()
        remove_tree(self._scratch)

    def _kill_group(self, cell: Cell) -> None:
        """Without a pid namespace the server's end isn't the programs' end."""
        if cell.pid and "pid_namespace" not in self.plan.present:
            with contextlib.suppress(OSError):
                os.killpg(cell.pid, signal.SIGKILL)

    # -- the loop ------------------------------------------------------------------------------------------------------------

    def loop(self) -> None:
        """Until the caller hangs up."""
        while self._alive:
            for key, _ in self._select.select(self._patience()):
                if key.fileobj in self._select.get_map():  # an earlier event may have closed it
                    key.data()
            self._watch()
            self._dispatch()
            self._refill()

    def _patience(self) -> float | None:
        running = [cell for cell in self._cells.values() if cell.call is not None]
        if not running:
            return None
        now = time.monotonic()
        ends = min(cell.call.started + cell.call.limits.wall_seconds for cell in running if cell.call is not None)
        return max(0.0, min(ends, self._next_tick if self._sums() else ends) - now)

    def _sums(self) -> bool:
        """Whether accounts have to be kept by hand."""
        return self._groups is None or not self._exact_tasks or "mount_namespace" not in self.plan.present

    def _watch(self) -> None:
        """Clocks and accounts."""
        now = time.monotonic()
        look = self._sums() and now >= self._next_tick
        if look:
            self._next_tick = now + TICK
        nested, private = "pid_namespace" in self.plan.present, "mount_namespace" in self.plan.present
        for cell in list(self._cells.values()):
            call = cell.call
            if call is None or call.verdict is not None:
                continue
            if now >= call.started + call.limits.wall_seconds:
                call.verdict = ("timeout", f"the program ran longer than {call.limits.wall_seconds:g} s")
            elif cell.flooded():
                call.verdict = ("output_limit", f"the program wrote more than {call.limits.flood_mb} MB of output")
            elif look and now - call.started > TICK / 2:
                call.verdict = cell.over_limit(self._server.pid, self._inherited, nested, private)
            if call.verdict is not None:
                self._order({"kill": cell.number})

    def _dispatch(self) -> None:
        while self._queue and self._idle and len(self._cells) - len(self._idle) - self._starting() < self._workers:
            cell = self._idle.popleft()
            if self._groups is not None:
                cell.group = self._groups.slot(cell.slot)
                cell.kills_before = cell.group.kills()
            cell.start(self._queue.popleft(), self._exact_tasks)

    def _starting(self) -> int:
        return sum(1 for cell in self._cells.values() if not cell.pid)

    def _refill(self) -> None:
        """Keep as many children waiting as may run at once."""
        if self._failures >= MOST_FAILURES:
            self._give_up()
            return
        while self._free_slots and len(self._idle) + self._starting() < self._workers:
            self._request_cell()

    def _request_cell(self) -> None:
        self._next_cell += 1
        number, slot = self._next_cell, self._free_slots.pop(0)
        control, child_control = socket.socketpair()
        control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        control.settimeout(10)
        out, child_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        err, child_err = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for fd in (child_out, child_err):
            os.set_blocking(fd, True)
        path = "/box" if "mount_namespace" in self.plan.present else f"{self._scratch}/{number}"
        cell = self._cells[number] = Cell(number, slot, control, Stream(out), Stream(err), path)
        self._order({"start": number, "slot": slot, "folder": path}, [child_control.fileno(), child_out, child_err])
        child_control.close()
        os.close(child_out)
        os.close(child_err)
        for stream in (cell.out, cell.err):
            self._select.register(stream.fd, selectors.EVENT_READ, lambda cell=cell, stream=stream: self._hear_program(cell, stream))
        self._select.register(control, selectors.EVENT_READ, lambda cell=cell: self._hear_cell(cell))

    def _order(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed by _hear_server
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors or [])

    # -- what is heard -------------------------------------------------------------------------------------------------------

    def _hear_caller(self) -> None:
        try:
            data = self._caller.recv(1 << 20)
        except BlockingIOError:
            data = None
        except ConnectionResetError:
            data = b""
        if data == b"":
            self._alive = False
        for message in self._frames.feed(data or b""):
            if "cancel" in message:
                self._cancel(message["cancel"])
                continue
            self._try_again()
            limits = replace(self._limits, **message.get("limits", {}))
            self._queue.append(Call(message["id"], message["job"], limits, message.get("fetch", [])))
        self._flush()

    def _cancel(self, number: int) -> None:
        """The caller no longer waits: free the cell. The answer still goes out and is ignored."""
        for call in [call for call in self._queue if call.number == number]:
            self._queue.remove(call)
        for cell in self._cells.values():
            if cell.call is not None and cell.call.number == number and cell.call.verdict is None:
                cell.call.verdict = ("sandbox_error", "the call was cancelled")
                self._order({"kill": cell.number})

    def _hear_cell(self, cell: Cell) -> None:
        """A child is confined and says so, once; its end of the socket closes when the program starts."""
        try:
            data, descriptors, pid = wire.receive_with_credentials(cell.control)
        except OSError:
            data, descriptors, pid = b"", [], 0
        self._select.unregister(cell.control)
        if not data:
            return
        cell.folder, cell.pid = descriptors[0], pid
        if self._groups is not None:
            group = self._groups.slot(cell.slot)
            group.set_limit(self._limits.memory_mb << 20)
            with contextlib.suppress(ProcessLookupError):
                group.add(pid)
        self._failures = 0
        self._idle.append(cell)

    def _hear_program(self, cell: Cell, stream: Stream) -> None:
        limits = cell.call.limits if cell.call is not None else self._limits
        stream.read(limits.output_kb << 10)
        if not stream.open:
            self._select.unregister(stream.fd)

    def _hear_server(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._server_died()
            return
        message = json.loads(data)
        if "failed" in message:
            cell = self._cells[message["failed"]]
            self._failed(cell, f"the fork server could not start a process ({message['why']})")
        else:
            self._ended(self._cells[message["exited"]], message["code"], message["cpu"])

    def _ended(self, cell: Cell, code: int, cpu: float) -> None:
        if cell.call is None:
            while cell.err.open and cell.err.read(1 << 12):
                continue
            self._failed(cell, f"a process could not be confined ({cell.err.text() or f'exit code {code}'})")
            return
        result = cell.finish(code, cpu)
        call = cell.call
        self._retire(cell)
        self._answer(call, result)

    def _failed(self, cell: Cell, why: str) -> None:
        self._failures += 1
        self._complaint = why
        self._retire(cell)

    def _retire(self, cell: Cell) -> None:
        """Forget a child that is gone; its slot may be used again."""
        if cell in self._idle:
            self._idle.remove(cell)
        for fileobj in (cell.control, cell.out.fd, cell.err.fd):
            with contextlib.suppress(KeyError, ValueError):
                self._select.unregister(fileobj)
        cell.close()
        if "mount_namespace" not in self.plan.present:
            remove_tree(cell.path)
        del self._cells[cell.number]
        self._free_slots.append(cell.slot)

    def _server_died(self) -> None:
        """Every program went with it, or goes now: answer their callers and start another server."""
        self._select.unregister(self._control)
        self._control.close()
        code = self._server.wait()
        self._complaint = f"the fork server died (code {code})"
        self._failures += 1
        for cell in list(self._cells.values()):
            self._kill_group(cell)
            call = cell.call
            self._retire(cell)
            if call is not None:
                self._answer(call, Result("sandbox_error", reason=self._complaint))
        if self._failures < MOST_FAILURES:
            try:
                self._start_server()
            except OSError as error:
                self._failures, self._complaint = MOST_FAILURES, str(error)

    def _try_again(self) -> None:
        """A new call is worth one more attempt after giving up."""
        if self._failures < MOST_FAILURES:
            return
        self._failures = MOST_FAILURES - 1
        if self._server.poll() is not None:
            with contextlib.suppress(OSError):
                self._start_server()

    def _give_up(self) -> None:
        """Nothing starts any more: the calls that wait get the reason."""
        while self._queue:
            self._answer(self._queue.popleft(), Result("sandbox_error", reason=f"{self._complaint}; {MOST_FAILURES} times in a row"))

    # -- answers -------------------------------------------------------------------------------------------------------------

    def _answer(self, call: Call, result: Result) -> None:
        files = {name: base64.b64encode(content).decode() for name, content in result.files.items()}
        self._send({"id": call.number, "result": {**vars(result), "files": files}})

    def _send(self, message: dict[str, Any]) -> None:
        self._unsent += wire.encode(message)
        self._flush()

    def _flush(self) -> None:
        """Send what the caller's socket takes; the rest waits until it takes more."""
        try:
            while self._unsent:
                sent = self._caller.send(self._unsent[: 1 << 18])
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._alive = False
        with contextlib.suppress(KeyError):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
            if self._select.get_key(self._caller).events != events:
                self._select.modify(self._caller, events, self._hear_caller)


def remove_tree(path: str) -> None:
    """Remove a folder a program had to itself, whatever it did to the permissions and however deep it went."""

    def force(_function: object, failed: str, _error: object) -> None:
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(failed), 0o700)
            os.chmod(failed, 0o700, follow_symlinks=False) if not os.path.islink(failed) else None

    for _ in range(3):
        with contextlib.suppress(RecursionError, OSError):
            shutil.rmtree(path, onerror=force)
        if not os.path.lexists(path):
            return
    subprocess.run(["rm", "-rf", "--", path], check=False, stderr=subprocess.DEVNULL)
