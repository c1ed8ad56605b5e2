"""What an attack aims at, all of it opened by the test itself: a secret file, a folder, listeners, a process. And whether it still stands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from retool.rl.sandbox import Sandbox

STOPPED = "TtZX"  # stopped, traced, dead: as /proc/pid/stat has it
SECRET = "retool-canary-7f3a"


@dataclass
class World:
    """The host as the attacks see it; `fill` puts its addresses into a program."""

    folder: Path
    secret: Path
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    abstract: socket.socket
    victim: subprocess.Popen[bytes]

    @staticmethod
    def open(folder: Path) -> World:
        folder.chmod(0o777)
        for parent in folder.parents:
            if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
                parent.chmod(0o755)  # so that only the sandbox stands between a program and the secret
        secret = folder / "secret.txt"
        secret.write_text(SECRET)
        secret.chmod(0o666)
        tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        path = f"/tmp/retool-canary-{os.getpid()}-{time.monotonic_ns()}.sock"  # a socket's path must be short
        unix.bind(path)
        os.chmod(path, 0o777)
        abstract.bind(f"\0retool-canary-{os.getpid()}-{time.monotonic_ns()}")
        for listener in (tcp, unix, abstract):
            listener.listen(8)
        for listener in (tcp, udp, unix, abstract):
            listener.setblocking(False)
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        return World(folder, secret, tcp, udp, unix, abstract, victim)

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        os.unlink(self.unix.getsockname())
        for listener in (self.tcp, self.udp, self.unix, self.abstract):
            listener.close()

    def fill(self, program: str, sandbox: Sandbox) -> str:
        values = {
            "TCP": self.tcp.getsockname()[1], "UDP": self.udp.getsockname()[1], "UNIX": repr(self.unix.getsockname()),
            "ABSTRACT": repr(b"\0" + self.abstract.getsockname()[1:]), "SECRET": repr(str(self.secret)), "FOLDER": repr(str(self.folder)),
            "VICTIM": self.victim.pid, "TEST": os.getpid(), "SUPERVISOR": sandbox.pid, "SERVER": sandbox.server_pid,
            "SCRATCH": repr(sandbox.scratch), "LIBRARY": repr(os.path.dirname(os.__file__)),
        }  # fmt: skip
        for name, value in values.items():
            program = program.replace(f"<{name}>", str(value))
        return program

    def assert_unchanged(self, sandbox: Sandbox) -> None:
        """Nothing was written, heard, stopped or left behind."""
        assert self.secret.read_text() == SECRET
        assert self.secret.stat().st_mode & 0o777 == 0o666
        assert self.secret.stat().st_nlink == 1
        assert sorted(os.listdir(self.folder)) == ["secret.txt"]
        for listener in (self.tcp, self.unix, self.abstract):
            assert _hears_nothing(listener.accept), "a program reached a listener of the host"
        assert _hears_nothing(lambda: self.udp.recv(100)), "a datagram left the sandbox"
        assert self.victim.poll() is None
        assert process_state(self.victim.pid) not in STOPPED
        assert process_state(sandbox.pid) not in STOPPED
        assert settled(sandbox), f"processes outlived their call: {descendants(sandbox.pid)}"


def _hears_nothing(receive) -> bool:
    try:
        receive()
    except BlockingIOError:
        return True
    return False


def process_state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def descendants(pid: int) -> list[int]:
    """Found by parent, from the whole of /proc: not the way the sandbox itself looks for them."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, queue = [], [pid]
    while queue:
        parent = queue.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        queue += children
    return found


def settled(sandbox: Sandbox, seconds: float = 20.0) -> bool:
    """Whether only the sandbox's own processes are left, within a while: the fork server, its guard, and the waiting children."""
    own = (2 if "pid_namespace" in sandbox.plan.present else 1) + sandbox.workers
    end = time.monotonic() + seconds
    while len(descendants(sandbox.pid)) != own:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
