"""The fork server's loop: children are made on request and reaped, each with what it started.

Requests come as JSON datagrams with the child's descriptors; answers are `init`, `failed`,
`exited`. A request may also be for another fork server, a twin.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from . import isolate, kernel, shortage, wire

END_SECONDS = 3  # that twins have to end in


class Child(BaseException):
    """Raised in a child of the fork server, to unwind to where it becomes a program."""

    def __init__(self, place: isolate.Place) -> None:
        self.place = place


class Twin(BaseException):
    """Raised in a fork of the fork server that is to be another one: its socket to the supervisor
    is descriptor 0, as the first one's is.
    """


@dataclass(frozen=True)
class Init:
    """The first process of a call's pid namespace, and the memory that is its stack."""

    pid: int
    stack: kernel.Stack


class Children:
    """Children by pid, and the loop that makes and reaps them."""

    def __init__(self, common: isolate.Confinement, control: socket.socket, own_pids: int) -> None:
        self._control = control
        self._own_pids = own_pids
        self._nested = "pid_namespace" in common.plan.present
        self._pids: dict[int, int] = {}
        self._ids: dict[int, int] = {}
        self._inits: dict[int, Init] = {}  # by cell
        self._ends: dict[int, dict[str, Any]] = {}  # of programs whose pid namespace isn't gone yet
        self._stacks: list[kernel.Stack] = []
        self._twins: list[int] = []
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # A dead child wakes `poll` by a byte in a pipe: a signal alone could come just before the
        # wait.
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def tell(self, message: dict[str, Any], sender: int = 0) -> None:
        """Send the supervisor a message.

        `sender` is a process that it learns of under its own name for it. Where it has gone: the
        end.
        """
        identity = struct.pack("iii", sender, os.getuid(), os.getgid())
        credentials = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, identity)] if sender else []
        try:
            self._control.sendmsg([json.dumps(message).encode()], credentials)
        except (BrokenPipeError, ConnectionResetError):
            self._end()

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
        try:
            data, descriptors, _ = wire.receive_with_credentials(self._control)
        except ConnectionResetError:  # the supervisor has gone before it heard all
            self._end()
        if not data:
            self._end()
        request = json.loads(data)
        if "kill" in request:
            self._kill(request["kill"])
            return
        if "heir" in request:  # to whom the call's orphans are handed
            number = request["heir"]
            if number in self._inits:
                self.tell({"init": number}, sender=self._inits[number].pid)
            return
        try:
            if "twin" in request:
                self._fork_twin(descriptors[0])
            else:
                self._start(request, descriptors)
        except OSError as error:
            # A twin that isn't made is missed when its socket ends
            if "start" in request:
                self.tell({"failed": request["start"], "why": shortage.told(error)})
        for fd in descriptors:
            os.close(fd)

    def _start(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Make a child for a cell; raises `Child` in it."""
        number = request["start"]
        if self._nested:
            # For the next forks: the namespace's first process, then the program itself.
            kernel.unshare(kernel.CLONE_NEWPID)
        try:
            if self._nested:
                self._start_init(number)
            pid = os.fork()
        except OSError:
            self._return_home()
            self._end_init(number)
            raise
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.detach()
            raise Child(isolate.Place(request["slot"], request["folder"], *descriptors))
        self._return_home()
        self._pids[number] = pid
        self._ids[pid] = number

    def _fork_twin(self, control: int) -> None:
        """Make another fork server; raises `Twin` in it.

        It is the first process of a pid namespace of its own: all that it makes ends with it.
        """
        if self._nested:
            kernel.unshare(kernel.CLONE_NEWPID)
        try:
            pid = os.fork()
        except OSError:
            self._return_home()
            raise
        if pid == 0:
            signal.set_wakeup_fd(-1)
            # Nothing of the first one's stays open: its supervisor shall notice when it ends
            self._control.detach()
            os.dup2(control, 0)
            for fd in (control, self._wake, self._waker):
                os.close(fd)
            raise Twin
        self._return_home()
        self._twins.append(pid)

    def _start_init(self, number: int) -> None:
        """The first process of a pid namespace: with it everything there ends, and signals that it
        doesn't handle pass it by.

        So it can't be the program itself, which may signal itself. This one only waits; it can't be
        reached from the program's memory.
        """
        stack = self._stacks.pop() if self._stacks else kernel.Stack()
        pid = kernel.clone_waiting(stack.top)
        self._inits[number] = Init(pid, stack)
        self._ids[pid] = number

    def _end_init(self, number: int) -> None:
        """End what is left of a call; `_reap` hears when it's gone."""
        if number in self._inits:
            os.kill(self._inits[number].pid, signal.SIGKILL)

    def _return_home(self) -> None:
        """Children of the next fork are to be in this server's own pid namespace again."""
        if self._nested:
            kernel.setns(self._own_pids, kernel.CLONE_NEWPID)

    def _reap(self) -> None:
        while True:
            try:
                # WNOWAIT looks and leaves the child a zombie, so that its pid can't be another
                # process's yet.
                waiting = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if waiting is None:
                return
            if not self._nested and waiting.si_pid in self._ids:
                # The group's name is free for others only after the wait below
                self._kill(self._ids[waiting.si_pid])
            pid, status, usage = os.wait4(waiting.si_pid, 0)
            number = self._ids.pop(pid, None)
            if number is None:
                if pid in self._twins:
                    self._twins.remove(pid)
                continue
            init = self._inits.get(number)
            # The namespace's first process went last: nothing of the call is left.
            if init is not None and pid == init.pid:
                del self._inits[number]
                self._stacks.append(init.stack)
                self._tell_end(number)
                continue
            # The program itself: its result is told once the rest of its namespace has gone.
            del self._pids[number]
            self._ends[number] = {
                "exited": number,
                "code": os.waitstatus_to_exitcode(status),
                "cpu": usage.ru_utime + usage.ru_stime,
                "at": time.monotonic(),
            }
            if init is None:
                self._tell_end(number)
            else:
                self._end_init(number)

    def _tell_end(self, number: int) -> None:
        """A program has ended, and everything that it had started."""
        end = self._ends.pop(number, None)
        if end is not None:
            self.tell(end)

    def _kill(self, number: int) -> None:
        """End a child and all that it started: its pid namespace goes with it, or its process
        group, which it can't leave.
        """
        pid = self._pids.get(number, 0)
        if not pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if not self._nested:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _end(self) -> NoReturn:
        for number in list(self._pids):
            self._kill(number)
        if not self._nested:
            # Twins end as this one does, for their supervisor has gone, too: with what their
            # children have started
            signal.alarm(END_SECONDS)
            for pid in self._twins:
                os.waitpid(pid, 0)
        os._exit(0)
