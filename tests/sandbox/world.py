"""What an attack aims at, all of it opened by the test itself: a secret file, a folder, listeners,
a process. And whether it still stands.

Everything belongs to the user who starts the sandbox: what keeps a program off must be the sandbox,
not somebody else's ownership.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from retool import sandbox as package
from retool.sandbox import Sandbox

STOPPED = "TtZX"  # stopped, traced, dead: as /proc/pid/stat has it
SECRET = "retool-canary-7f3a"
IOPRIO_GET = {"x86_64": 252, "aarch64": 31}[platform.machine()]


@dataclass
class World:
    """The host as the attacks see it; `fill` puts its addresses into a program."""

    folder: Path
    secret: Path
    library: Path  # a file of Python's own, which every program may read
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    abstract: socket.socket
    victim: subprocess.Popen[bytes]
    before: dict[str, object] = field(default_factory=dict)

    @staticmethod
    def open(
        folder: Path, uid: int | None = None, library: str = os.path.dirname(os.__file__)
    ) -> World:
        """`uid`: who owns what is attacked; None: who runs the tests."""
        owner = os.geteuid() if uid is None else uid
        folder.chmod(0o777)
        secret = folder / "secret.txt"
        secret.write_text(SECRET)
        secret.chmod(0o666)
        tcp = socket.socket()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        unix = socket.socket(socket.AF_UNIX)
        abstract = socket.socket(socket.AF_UNIX)
        # a socket's path must be short
        path = f"/tmp/retool-canary-{os.getpid()}-{time.monotonic_ns()}.sock"
        unix.bind(path)
        os.chmod(path, 0o777)
        abstract.bind(f"\0retool-canary-{os.getpid()}-{time.monotonic_ns()}")
        for listener in (tcp, unix, abstract):
            listener.listen(8)
        for listener in (tcp, udp, unix, abstract):
            listener.setblocking(False)
        if owner != os.geteuid():
            os.chown(folder, owner, owner)
            os.chown(secret, owner, owner)
        world = World(
            folder, secret, Path(library, "os.py"), tcp, udp, unix, abstract, sleeper(owner)
        )
        world.remember()
        return world

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        os.unlink(self.unix.getsockname())
        shutil.rmtree(self.folder)
        for listener in (self.tcp, self.udp, self.unix, self.abstract):
            listener.close()

    def fill(self, program: str, sandbox: Sandbox) -> str:
        values = {
            "TCP": self.tcp.getsockname()[1],
            "UDP": self.udp.getsockname()[1],
            "UNIX": repr(self.unix.getsockname()),
            "ABSTRACT": repr(b"\0" + self.abstract.getsockname()[1:]),
            "SECRET": repr(str(self.secret)),
            "FOLDER": repr(str(self.folder)),
            "VICTIM": self.victim.pid,
            "TEST": os.getpid(),
            "SUPERVISOR": sandbox.pid,
            "SERVER": sandbox.server_pids[0],
            "SCRATCH": repr(sandbox.scratch),
            "LIBRARY": repr(str(self.library.parent)),
            "BACKWARDS": repr(os.path.dirname(package.__file__)[::-1]),
            "HOSTNAME": repr(socket.gethostname()),
        }
        for name, value in values.items():
            program = program.replace(f"<{name}>", str(value))
        return program

    def remember(self) -> None:
        """How everything is; `assert_unchanged` compares with it."""
        self.before = self.state()

    def state(self) -> dict[str, object]:
        """Content, metadata and extended attributes of the files; limits, priorities and processors
        of the victim.
        """
        found: dict[str, object] = {
            "content": self.secret.read_text(),
            "names": sorted(os.listdir(self.folder)),
        }
        for path in (self.folder, self.secret, self.library):
            found[f"metadata of {path}"] = metadata(path)
        if self.victim.poll() is None:
            pid = self.victim.pid
            found["limits"] = Path(f"/proc/{pid}/limits").read_text()
            found["niceness"] = os.getpriority(os.PRIO_PROCESS, pid)
            found["processors"] = sorted(os.sched_getaffinity(pid))
            found["policy"] = os.sched_getscheduler(pid)
            found["I/O priority"] = ctypes.CDLL(None).syscall(IOPRIO_GET, 1, pid)
        return found

    def mend(self) -> None:
        """Undo what an attack did, for the next one: a fresh victim, the files as they were."""
        self.victim.kill()
        self.victim.wait()
        self.victim = sleeper(self.folder.stat().st_uid)
        for path in self.folder.iterdir():
            if path != self.secret:
                path.unlink()
        self.folder.chmod(0o777)
        self.secret.write_text(SECRET)
        self.secret.chmod(0o666)
        for name in os.listxattr(self.secret):
            os.removexattr(self.secret, name)
        for listener in (self.tcp, self.unix, self.abstract):
            hears_nothing(listener.accept)
        hears_nothing(lambda: self.udp.recv(100))
        self.remember()

    def assert_unchanged(self, sandbox: Sandbox) -> None:
        """Nothing was written, heard, stopped, slowed or left behind."""
        now = self.state()
        changed = {
            name: (value, now.get(name))
            for name, value in self.before.items()
            if now.get(name) != value
        }
        assert not changed, f"then and now: {changed}"
        for listener in (self.tcp, self.unix, self.abstract):
            assert hears_nothing(listener.accept), "a program reached a listener of the host"
        assert hears_nothing(lambda: self.udp.recv(100)), "a datagram left the sandbox"
        assert self.victim.poll() is None
        assert process_state(self.victim.pid) not in STOPPED
        assert process_state(sandbox.pid) not in STOPPED
        assert settled(sandbox), f"processes outlived their call: {descendants(sandbox.pid)}"


def sleeper(uid: int) -> subprocess.Popen[bytes]:
    """A process of that user which does nothing, for an hour."""
    command = ["sleep", "3600"]
    if uid == os.geteuid():
        return subprocess.Popen(command)
    return subprocess.Popen(command, user=uid, group=uid, extra_groups=[])


def metadata(path: Path) -> tuple[object, ...]:
    """All that the file system keeps beside the content, but when it was last read."""
    about = path.lstat()
    times = about.st_mtime_ns, about.st_ctime_ns
    attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    return (
        about.st_mode,
        about.st_uid,
        about.st_gid,
        about.st_size,
        about.st_nlink,
        times,
        attributes,
    )


def hears_nothing(receive: Callable[[], object]) -> bool:
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
    found = []
    queue = [pid]
    while queue:
        parent = queue.pop()
        children = [child for child, its in parents.items() if its == parent]
        found += children
        queue += children
    return found


def settled(sandbox: Sandbox, seconds: float = 20.0) -> bool:
    """Whether only the sandbox's own processes are left, within a while: the fork servers, and the
    waiting children; with pid namespaces the first server's guard, too, and the first process of
    each child's.
    """
    nested = "pid_namespace" in sandbox.plan.present
    own = len(sandbox.server_pids) + (1 + 2 * sandbox.workers if nested else sandbox.workers)
    end = time.monotonic() + seconds
    while len(descendants(sandbox.pid)) != own:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
