"""The Linux calls that isolation is made of, straight from libc: namespaces, mounts, capabilities,
prctl.

Each function raises `OSError` with the kernel's errno and the call's name; nothing here decides
policy. Numbers come from the kernel's uapi headers and hold for x86_64 and aarch64 alike unless
`syscalls.py` says otherwise.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct

CLONE_VM = 0x00000100
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
# What statvfs tells of a mount; the numbers are mount's own, but for relatime's, which is MS_BIND
_ST_RELATIME = 0x1000
_NOATIME = 1024
_NODIRATIME = 2048
_RELATIME = 1 << 21

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_THP_DISABLE = 41
CAP_SYS_ADMIN = 21
CAP_LAST = 40

# the same on every architecture: numbers above 424 are shared
SYS_MOUNT_SETATTR = 442
SYS_CLOSE_RANGE = 436
SYS_PIDFD_OPEN = 434
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MADV_COLLAPSE = 25

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
SIGNAL_SET = 128
SIG_SETMASK = 2
_EVERY_SIGNAL = ctypes.create_string_buffer(SIGNAL_SET)
libc.sigfillset(_EVERY_SIGNAL)
_PAUSE = ctypes.cast(libc.pause, ctypes.c_void_p)
libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def check(result: int, call: str) -> int:
    """`result`, or `OSError` named after `call` where it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    check(libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    check(libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def pidfd_open(pid: int) -> int:
    """A descriptor that stands for a process, closed on exec. Not every build of Python has its
    own.
    """
    no_flags = ctypes.c_uint(0)
    return check(libc.syscall(SYS_PIDFD_OPEN, ctypes.c_int(pid), no_flags), "pidfd_open")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(
        libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]),
        f"mount {target}",
    )


def unmount(target: str) -> None:
    check(libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    number = _PIVOT_ROOT[os.uname().machine]
    check(libc.syscall(number, os.fsencode(new_root), os.fsencode(put_old)), "pivot_root")


def make_read_only(target: str, devices: bool = False) -> None:
    """Make a bind mount and everything below it read-only, without set-uid programs, and without
    devices unless asked for.
    """
    no_devices = 0 if devices else MS_NODEV
    wanted = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | (0 if devices else MOUNT_ATTR_NODEV)
    attributes = struct.pack("QQQQ", wanted, 0, 0, 0)
    result = libc.syscall(
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        os.fsencode(target),
        AT_RECURSIVE,
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    if result == 0:
        return
    # Before Linux 5.12: remount by hand. Inside a user namespace the flags already there are locked
    # and must be repeated.
    locked = os.statvfs(target).f_flag & ~(MS_RDONLY | _ST_RELATIME)
    kept = locked & (MS_NOEXEC | _NOATIME | _NODIRATIME | _RELATIME)
    mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | no_devices | kept)


class Stack:
    """Memory for a process that shares this one's; `top` is its upper end."""

    SIZE = 16 << 10

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.top = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + self.SIZE


def clone_waiting(stack: int) -> int:
    """Start a process that shares this one's memory and only ever waits, with every signal blocked;
    returns its pid.

    It costs next to nothing, where a fork would copy page tables. `stack` is the top of one that
    nothing else uses.
    """
    before = ctypes.create_string_buffer(SIGNAL_SET)
    # Python's own makes a hundred objects of it
    libc.pthread_sigmask(SIG_SETMASK, _EVERY_SIGNAL, before)
    try:
        return check(
            libc.clone(
                _PAUSE, ctypes.c_void_p(stack), ctypes.c_int(CLONE_VM | signal.SIGCHLD), None
            ),
            "clone",
        )
    finally:
        libc.pthread_sigmask(SIG_SETMASK, before, None)


def prctl(option: int, a: int = 0, b: int = 0) -> int:
    return check(libc.prctl(option, a, b, 0, 0), f"prctl {option}")


def close_from(first: int) -> None:
    """Close every descriptor from `first` on."""
    last = ctypes.c_uint(0xFFFFFFFF)
    refused = libc.syscall(SYS_CLOSE_RANGE, ctypes.c_uint(first), last, ctypes.c_uint(0)) < 0
    if refused:  # before Linux 5.9
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def set_capabilities() -> None:
    """Give up every capability: permitted, effective and inheritable."""
    check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)), "capset")


def drop_bounding_set() -> None:
    """No later exec can hand out a capability; needs CAP_SETPCAP, without which there is none to
    hand out.
    """
    for capability in range(CAP_LAST + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def effective_capabilities() -> int:
    """The bit set of this process's effective capabilities."""
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    check(libc.capget(header, data), "capget")
    words = struct.unpack("IIIIII", data.raw)
    return words[0] | words[3] << 32


def collapse_into_huge_pages(memory_map: str) -> None:
    """Back this process's private memory by 2 MB pages where the kernel can (Linux 6.1): a fork
    then copies far fewer entries.

    `memory_map` is the text of its /proc/self/maps.
    """
    size = 2 << 20
    for fields in map(str.split, memory_map.splitlines()):
        start, end = (int(bound, 16) for bound in fields[0].split("-"))
        if fields[1] != "rw-p" or (len(fields) > 5 and fields[5] != "[heap]"):
            continue
        for address in range(-(-start // size) * size, end - size + 1, size):
            # Refused is fine
            libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_COLLAPSE)
