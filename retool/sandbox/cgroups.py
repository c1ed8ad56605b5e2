"""A memory account per call where the kernel lets us keep one: cgroup v2 or v1, whichever is
writable.

Groups are made once per slot and used again, because a removed group lives on in the kernel as long
as a cached page remembers it.
"""

from __future__ import annotations

import contextlib
import os
import time

_ROOT = "/sys/fs/cgroup"


def _own(controllers: str) -> str:
    """This process's group in the hierarchy of `controllers` ("" is v2's), as /proc/self/cgroup has
    it.
    """
    with open("/proc/self/cgroup") as file:
        for line in file:
            _, names, path = line.rstrip("\n").split(":", 2)
            if controllers in names.split(","):
                return path
    return ""


def _parents() -> list[tuple[str, str]]:
    """(version, folder) of where groups could be made, best first."""
    places = [
        ("v2", _ROOT + _own("")),
        ("v2", _ROOT),
        ("v1", f"{_ROOT}/memory{_own('memory')}"),
        ("v1", f"{_ROOT}/memory"),
    ]
    return [(version, folder.rstrip("/")) for version, folder in places]


def _usable(version: str, folder: str) -> bool:
    """Whether this process may make groups in `folder` that have a memory limit."""
    if version == "v1":
        needed = "memory.limit_in_bytes"
    elif _controls_memory(folder):
        needed = "cgroup.procs"
    else:
        return False
    return os.path.exists(f"{folder}/{needed}") and os.access(folder, os.W_OK)


def _controls_memory(folder: str) -> bool:
    """Whether a v2 group hands the memory controller down."""
    try:
        with open(folder + "/cgroup.subtree_control") as file:
            return "memory" in file.read().split()
    except OSError:
        return False


def find() -> str:
    """Where groups with a memory limit can be made, as "v1:folder" or "v2:folder"; "" for nowhere."""
    for version, folder in _parents():
        if not _usable(version, folder):
            continue
        # Being writable isn't enough: a limit must be accepted, too, which a controller that isn't
        # handed down refuses.
        trial = f"{folder}/retool-probe-{os.getpid()}"
        try:
            os.mkdir(trial)
            Group(version, trial).set_limit(64 << 20)
        except OSError:
            continue
        finally:
            with contextlib.suppress(OSError):
                os.rmdir(trial)
        return f"{version}:{folder}"
    return ""


class Group:
    """One call's account."""

    def __init__(self, version: str, folder: str) -> None:
        self.folder = folder
        self._version = version
        if version == "v1":
            self._limit_file = "memory.limit_in_bytes"
            self._swap_file = "memory.memsw.limit_in_bytes"
            self._events_file = "memory.oom_control"
        else:
            self._limit_file = "memory.max"
            self._swap_file = "memory.swap.max"
            self._events_file = "memory.events"
        self._limit = 0  # bytes, as last set
        self._events = -1
        self.entrance = -1

    def open(self) -> None:
        """Make the descriptors that every call needs: `entrance`, for `join`, and one to read."""
        self.entrance = os.open(f"{self.folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        self._events = os.open(f"{self.folder}/{self._events_file}", os.O_RDONLY | os.O_CLOEXEC)

    def set_limit(self, limit: int) -> None:
        """Bound memory, page tables and tmpfs files together, without swap, to `limit` bytes."""
        if limit == self._limit:
            return
        # v1 counts memory and swap together, v2 swap alone
        swap = str(limit) if self._version == "v1" else "0"
        order = [(self._limit_file, str(limit)), (self._swap_file, swap)]
        # v1 never lets memory's limit be above the one of both
        if limit > self._limit > 0:
            order.reverse()
        for name, text in order:
            if name != self._swap_file or os.path.exists(f"{self.folder}/{name}"):
                self._write(name, text)
        if self._version == "v2" and os.path.exists(self.folder + "/memory.oom.group"):
            self._write("memory.oom.group", "1")
        self._limit = limit

    def kills(self) -> int:
        """How often the kernel has killed in this group for lack of memory."""
        for line in os.pread(self._events, 4096, 0).splitlines():
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
        return 0

    def _write(self, name: str, text: str) -> None:
        with open(f"{self.folder}/{name}", "w") as file:
            file.write(text)


def join(entrance: int) -> None:
    """Let this process's memory be counted in the group that `entrance` belongs to."""
    os.write(entrance, b"0")


class Groups:
    """The groups of all slots, under one folder of this server's."""

    def __init__(self, place: str) -> None:
        self._version, parent = place.split(":", 1)
        self._folder = f"{parent}/retool-sandbox-{os.getpid()}"
        self._groups: dict[int, Group] = {}
        _remove_abandoned(parent)
        os.mkdir(self._folder)
        if self._version == "v2":
            with open(self._folder + "/cgroup.subtree_control", "w") as file:
                file.write("+memory")

    def slot(self, number: int) -> Group:
        """The group of slot `number`, made at its first use."""
        if number not in self._groups:
            folder = f"{self._folder}/{number}"
            os.mkdir(folder)
            group = Group(self._version, folder)
            group.open()
            self._groups[number] = group
        return self._groups[number]

    def remove(self) -> None:
        """Remove what this server made; its processes are gone by now."""
        end = time.monotonic() + 2
        while not _remove(self._folder) and time.monotonic() < end:
            time.sleep(0.02)  # the last of them are still being taken apart


def _remove(folder: str) -> bool:
    """Whether a server's group and those of its slots are gone."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir():
                os.rmdir(entry.path)
        os.rmdir(folder)
    return not os.path.exists(folder)


def _remove_abandoned(parent: str) -> None:
    """Groups of servers that were killed before they could clear up."""
    for name in os.listdir(parent):
        pid = name.removeprefix("retool-sandbox-")
        if pid != name and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            _remove(f"{parent}/{name}")
