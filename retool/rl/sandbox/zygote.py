"""The warm fork server: an interpreter with the usual packages imported that turns into confined children on request.

It holds no program and no output: those pass between the supervisor and the child alone, so a fork inherits nothing of another
call. Requests come as JSON datagrams on descriptor 0 with the child's three descriptors; answers are `started`, `failed`, `exited`.
"""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from . import isolate, kernel, landlock, layers, program, rootfs, uids, wire

MODULES = (
    "numpy", "numpy.random", "numpy.linalg", "numpy.fft", "sympy", "mpmath", "math", "cmath", "fractions", "decimal", "itertools",
    "functools", "collections", "operator", "random", "re", "json", "datetime", "statistics", "heapq", "bisect", "string", "copy", "time",
    "typing", "dataclasses", "enum", "textwrap", "warnings", "calendar", "contextlib", "tokenize", "traceback", "linecache", "inspect",
    "struct", "hashlib", "base64", "csv", "pprint", "numbers", "queue", "threading", "codecs", "ast", "abc",
)  # fmt: skip
NOT_ISOLATED = 251


@dataclass(frozen=True)
class Setup:
    """What the supervisor tells its server at the start."""

    plan: layers.Plan
    scratch: str
    folder_mb: int


def main() -> NoReturn:
    """Run on the control socket at descriptor 0, with the setup in the first argument."""
    fields = json.loads(sys.argv[1])
    setup = Setup(layers.Plan.from_json(fields["plan"]), fields["scratch"], fields["folder_mb"])
    os.umask(0o022)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if setup.plan.outer_user:
        uids.enter_user_namespace(setup.plan.uids)
    if "network_namespace" in setup.plan.present:
        kernel.unshare(kernel.CLONE_NEWNET)
    if "ipc_namespace" in setup.plan.present:
        kernel.unshare(kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS)
    if "pid_namespace" in setup.plan.present:
        kernel.unshare(kernel.CLONE_NEWPID)
        inner = os.fork()
        if inner:
            _stand_by(inner)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    _serve(setup)


def _stand_by(inner: int) -> NoReturn:
    """The process left outside the pid namespace only carries the inner one's end to the supervisor."""
    os.close(0)
    os._exit(1 if os.waitpid(inner, 0)[1] else 0)


def _serve(setup: Setup) -> NoReturn:
    statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if "pid_namespace" in setup.plan.present else -1
    memory_map = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    copies = rootfs.copy_hidden(setup.plan.hidden, setup.scratch)
    search_path, rights = [copies.get(path, path) for path in rootfs.search_path()], rootfs.rights(list(copies.values()))
    if "mount_namespace" in setup.plan.present:
        kernel.unshare(kernel.CLONE_NEWNS)
        rootfs.enter(setup.scratch)
    sys.path[:] = search_path
    _move_packages(copies)
    _warm_up()
    with open(memory_map) as file:
        kernel.collapse_into_huge_pages(file.read())
    base = int(os.read(statm, 256).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    granted = landlock.open_paths(rights) if "landlock" in setup.plan.present else []
    if "pid_namespace" not in setup.plan.present:
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    control = socket.socket(fileno=0)
    server = Server(isolate.prepare(setup.plan, granted, setup.folder_mb), control, own_pids, base)
    server.tell({"ready": True})
    server.loop()


def _move_packages(copies: dict[str, str]) -> None:
    """Point packages that are already imported to the copies of their folders, where their other modules can be read."""
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        places = getattr(module, "__path__", None)
        if isinstance(places, list):
            for old, new in copies.items():
                places[:] = [new + place[len(old) :] if place.startswith(old + "/") else place for place in places]


def _warm_up() -> None:
    """Import what programs use, and load what sympy loads late; a package that isn't installed is left to the program to miss."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    if "sympy" in sys.modules:
        import sympy

        x = sympy.symbols("x")
        sympy.solve(x**2 - 3 * x + 2, x)
        sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
        sympy.factorint(360)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(0)  # every call starts from the same state
    program.warm_up()
    gc.collect()
    gc.disable()
    gc.freeze()


class Server:
    """Children by pid, and the loop that makes and reaps them."""

    def __init__(self, common: isolate.Confinement, control: socket.socket, own_pids: int, base: int) -> None:
        self._common = common
        self._control = control
        self._own_pids = own_pids
        self._base = base
        self._nested = "pid_namespace" in common.plan.present
        self._pids: dict[int, int] = {}
        self._ids: dict[int, int] = {}
        self._wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def tell(self, message: dict[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())

    def loop(self) -> NoReturn:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._reap()
            if self._control.fileno() in ready:
                self._obey()

    def _obey(self) -> None:
        data, descriptors, _ = wire.receive_with_credentials(self._control)
        if not data:
            self._end()
        request = json.loads(data)
        if "kill" in request:
            self._kill(self._pids.get(request["kill"], 0))
            return
        try:
            self._start(request, descriptors)
        except OSError as error:
            self.tell({"failed": request["start"], "why": str(error)})
        finally:
            for fd in descriptors:
                os.close(fd)

    def _start(self, request: dict[str, Any], descriptors: list[int]) -> None:
        number = request["start"]
        cell = isolate.Cell(request["slot"], *descriptors, folder=request["folder"])
        if self._nested:
            kernel.unshare(kernel.CLONE_NEWPID)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_program(cell)
        finally:
            if self._nested:
                kernel.setns(self._own_pids, kernel.CLONE_NEWPID)
        self._pids[number], self._ids[pid] = pid, number

    def _become_program(self, cell: isolate.Cell) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.detach()
            folder = isolate.confine(self._common, cell)
            control = socket.socket(fileno=isolate.CONTROL)
            control.sendmsg([b"R"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [folder]))])
            os.close(folder)
            job = wire.read_frame(control.detach())
            os.close(isolate.CONTROL)
            if job is None:
                os._exit(0)
            program.run(job, self._base)
        except BaseException as error:  # before the program started: whatever it is, this isn't a cell
            os.write(cell.stderr if _is_open(cell.stderr) else 2, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(NOT_ISOLATED)

    def _reap(self) -> None:
        while True:
            try:
                waiting = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if waiting is None:
                return
            if not self._nested and waiting.si_pid in self._ids:
                self._kill(waiting.si_pid)  # the group's name is free for others only after the wait below
            pid, status, usage = os.wait4(waiting.si_pid, 0)
            number = self._ids.pop(pid, None)
            if number is not None:
                del self._pids[number]
                cpu = usage.ru_utime + usage.ru_stime
                self.tell({"exited": number, "code": os.waitstatus_to_exitcode(status), "cpu": cpu, "peak_kb": usage.ru_maxrss})

    def _kill(self, pid: int) -> None:
        """End a child and all that it started: its pid namespace goes with it, or its process group, which it can't leave."""
        if not pid:
            return
        for end in (lambda: os.kill(pid, signal.SIGKILL), lambda: None if self._nested else os.killpg(pid, signal.SIGKILL)):
            try:
                end()
            except ProcessLookupError:
                continue

    def _end(self) -> NoReturn:
        for pid in list(self._ids):
            self._kill(pid)
        os._exit(0)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
