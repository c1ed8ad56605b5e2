"""What a call uses, summed from outside: processes and memory from /proc, files from the work
folder.

The kernel's own accounts (cgroup, RLIMIT_NPROC in a user namespace or on a uid of its own) are
exact and come first; this is for where they can't be had. It reads only what /proc shows of any
process, because a confined one can't be looked into.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_PAGE = os.sysconf("SC_PAGE_SIZE")
MAX_FILES = 16384  # of a work folder that are counted
ENDLESS = 1 << 62  # bytes: more than any limit


@dataclass(frozen=True)
class Usage:
    """Processes and threads together, and private memory in bytes."""

    tasks: int
    memory: int


def group_of(root: int, heir: int, leads_group: bool) -> list[int]:
    """Pids of the call that `root` began.

    Orphans are handed to `heir`: the first process of the call's pid namespace, or the fork server
    where there is none. The fork server has other calls' orphans too; there the process group,
    which nobody can leave, tells them apart (`leads_group`).
    """
    orphans = [
        pid
        for pid in _children(heir)
        if pid != root and (not leads_group or process_group(pid) == root)
    ]
    found = []
    queue = [root, *orphans]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += _children(pid)
    return found


def usage(pids: list[int], inherited: int) -> Usage:
    """What the processes use together.

    `inherited` bytes are the warm interpreter's, shared by every fork of it.

    A process answers for what it has beyond those, and for every page it may have copied since: no
    more than it took page faults. That counts too much rather than too little (large pages, where
    one fault could bring many, are off for programs).
    """
    tasks = memory = 0
    for pid in pids:
        fields = _stat(pid)
        if fields:
            tasks += int(fields[17])
            private = private_memory(pid)
            may_have_copied = int(fields[7]) * _PAGE  # a page for each fault
            memory += min(private, max(0, private - inherited) + may_have_copied)
    return Usage(tasks, memory)


def private_memory(pid: int) -> int:
    """Anonymous resident bytes of a process; 0 where it's gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * _PAGE


def waited(pid: int) -> float:
    """Seconds that a process was ready to run and had no processor; 0 where the kernel doesn't say."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/pid/stat after the command name; state first."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name stands in brackets and may hold spaces and brackets of its own
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def has_ended(pid: int) -> bool:
    """Whether a process, with all its threads, only waits to be reaped."""
    fields = _stat(pid)
    return bool(fields) and fields[0] == b"Z" and fields[17] == b"1"


def process_group(pid: int) -> int:
    """The process group of a process or thread; 0 where it's gone."""
    fields = _stat(pid)
    return int(fields[2]) if fields else 0


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    except FileNotFoundError:
        own = os.getpid()
        if os.path.exists(f"/proc/{pid}") and not os.path.exists(
            f"/proc/{own}/task/{own}/children"
        ):
            return _children_by_parent(pid)  # a kernel without CONFIG_PROC_CHILDREN
    except OSError:
        pass
    return found


def _children_by_parent(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _stat(int(name))
            if fields and int(fields[1]) == parent:
                found.append(int(name))
    return found


def folder_bytes(descriptor: int, private: bool) -> int:
    """Bytes that files occupy: a mount of its own is asked, a folder on the host is walked.

    A folder with too many files, or too deep to walk, counts as endless.
    """
    if private:
        space = os.fstatvfs(descriptor)
        return (space.f_blocks - space.f_bfree) * space.f_frsize
    total = count = 0
    queue = [f"/proc/self/fd/{descriptor}"]
    try:
        while queue:
            with os.scandir(queue.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > MAX_FILES:
                        return ENDLESS
                    # What it occupies, not how long it says it is: a file with a hole costs nothing
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)
    except FileNotFoundError:
        return total
    except OSError:
        return ENDLESS
    return total
