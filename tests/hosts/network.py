"""Several machines on this one: each a set of namespaces with its own address, loopback, name,
/dev/shm and disk, on a network that nothing else is on.

    switch ── bridge 10.77.0.254 ─┬─ eth0 10.77.0.1 of a
                                  ├─ eth0 10.77.0.2 of b
                                  └─ …

Needs Linux, iproute2 and util-linux, and root or user namespaces; `network` skips where it may not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import warm

NAMES = "abc"
# The host itself is its process's namespaces; it lasts as long as its standard input
SWITCH = """
set -e
ip link set lo up
ip link add bridge0 type bridge
ip addr add 10.77.0.254/24 dev bridge0
ip link set bridge0 up
exec 3<&0
start() {
    number=$1 name=$2 disk=$3
    unshare --net --uts --mount --propagation private sh -c '
        hostname host-'$name'
        ip link set lo up
        mount --bind '$disk'/'$name' '$disk'/here
        mount -t tmpfs shm /dev/shm
        mount --bind '$disk'/hosts /etc/hosts
        echo up; exec cat' <&3 >$disk/$name.up &
    pid=$!
    until [ -s $disk/$name.up ]; do sleep 0.02; done
    ip link add port-$name type veth peer name eth0 netns $pid
    ip link set port-$name master bridge0 up
    nsenter -t $pid -n ip addr add 10.77.0.$number/24 dev eth0
    nsenter -t $pid -n ip link set eth0 up
    echo $name $pid
}
"""
CLONE_NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Host:
    """A machine: the process that keeps its namespaces, and the folder that is only its own."""

    name: str
    address: str
    pid: int
    switch: int
    disk: Path

    def enter(self) -> None:
        """Move this process, which must have one thread, to the machine."""
        folder = Path(f"/proc/{self.pid}/ns")
        kinds = (
            ["user"] if os.readlink(folder / "user") != os.readlink("/proc/self/ns/user") else []
        )
        handles = [os.open(folder / kind, os.O_RDONLY) for kind in (*kinds, "net", "uts", "mnt")]
        here = os.getcwd()
        for handle in handles:
            if _libc.setns(handle, 0):
                raise OSError(ctypes.get_errno(), f"{self.name} can't be entered")
            os.close(handle)
        os.chdir(here)

    def start(self, words: Sequence[str | Path], **named: Any) -> warm.Popen:
        """`python words` there, as a fork of the warm server."""
        inside = [sys.executable, "-m", "tests.hosts.inside", str(self.pid)]
        return warm.Popen([*inside, *map(str, words)], text=True, **named)

    def cut(self) -> None:
        """Pull the cable out."""
        self._port("down")

    def mend(self) -> None:
        """Put the cable back."""
        self._port("up")

    def shape(self, gbit: float) -> None:
        """Let so many Gbit/s in, and out. Latency stays what it is: only bandwidth is shaped."""
        limit = ["root", "tbf", "rate", f"{gbit:g}gbit", "burst", "256kb", "latency", "50ms"]
        into = ["tc", "qdisc", "replace", "dev", f"port-{self.name}", *limit]
        in_switch(self.switch, into)
        out_of = ["tc", "qdisc", "replace", "dev", "eth0", *limit]
        subprocess.run([*inside(self.pid, "n"), *out_of], check=True, capture_output=True)

    def crash(self) -> None:
        """Kill everything that runs there, at once."""
        network = f"/proc/{self.pid}/ns/net"
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if pid != self.pid and os.path.samefile(entry / "ns" / "net", network):
                    os.kill(pid, signal.SIGKILL)

    def _port(self, state: str) -> None:
        in_switch(self.switch, ["ip", "link", "set", f"port-{self.name}", state])


def inside(pid: int, kinds: str = "num") -> list[str]:
    """The beginning of a command that runs in a process's namespaces: n of networks, u of names, m
    of disks.
    """
    user = os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user")
    also = ["-U", "--preserve-credentials"] if user else []
    return ["nsenter", "-t", str(pid), *also, *(f"-{kind}" for kind in kinds)]


def in_switch(pid: int, command: Sequence[str]) -> None:
    """Run a command where the network's cables meet."""
    subprocess.run([*inside(pid, "n"), *command], check=True, capture_output=True)


@contextlib.contextmanager
def network(count: int, folder: Path, named: bool = False) -> Iterator[list[Host]]:
    """`count` machines. `folder/here` is a disk of its own on each; everything else is shared.

    `named`: their names mean their addresses, as a cluster's do. A container's often mean nothing.
    """
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: machines are namespaces that it makes")
    names = NAMES[:count]
    for name in ("here", *names):
        (folder / name).mkdir(parents=True)
    known = [f"10.77.0.{number} host-{name}" for number, name in enumerate(names, 1)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known * named, ""]))
    lines = [f"start {number} {name} {folder}" for number, name in enumerate(names, 1)]
    script = "\n".join([SWITCH, *lines, "echo ready; exec cat"])
    root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["unshare", *root, "--net", "sh", "-c", script], stdin=pipe, stdout=pipe, text=True
    ) as switch:
        assert switch.stdin and switch.stdout
        try:
            pids = dict(_told(switch))
            if len(pids) < count:
                pytest.skip("namespaces and veth pairs aren't allowed here")
            yield [
                Host(name, f"10.77.0.{n}", pids[name], switch.pid, folder / "here")
                for n, name in enumerate(names, 1)
            ]
        finally:
            switch.stdin.close()


def _told(switch: subprocess.Popen[str]) -> Iterator[tuple[str, int]]:
    assert switch.stdout
    for line in switch.stdout:
        if line == "ready\n":
            return
        name, pid = line.split()
        yield name, int(pid)
