"""Runs a command the way a default container does: no new namespaces, no mounts, few capabilities.

`refuse.py [--no-scopes | --no-pidfd] COMMAND…`

A system-call filter of its own, simpler than the one under test, answers EPERM; the bounding set is
cut to what container runtimes leave. Whatever it starts meets a real kernel's refusal, not a
simulated one. `--no-scopes`: Landlock takes no rules on signals and sockets, as before Linux 6.12.
`--no-pidfd` refuses nothing else: no descriptor stands for a process, as before Linux 5.3.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

LOAD = 0x20
JEQ = 0x15
JGE = 0x35
JSET = 0x45
RET = 0x06
ALLOW = 0x7FFF0000
EPERM = 0x00050001
ENOSYS = 0x00050026
DENIED = {
    "x86_64": {
        "unshare": 272,
        "setns": 308,
        "mount": 165,
        "umount2": 166,
        "pivot_root": 155,
        "open_tree": 428,
        "move_mount": 429,
        "fsopen": 430,
        "fsmount": 432,
        "mount_setattr": 442,
    },
    "aarch64": {
        "unshare": 97,
        "setns": 268,
        "mount": 40,
        "umount2": 39,
        "pivot_root": 41,
        "open_tree": 428,
        "move_mount": 429,
        "fsopen": 430,
        "fsmount": 432,
        "mount_setattr": 442,
    },
}
LANDLOCK_CREATE = 444
SIZE_WITH_SCOPES = 24
E2BIG = 0x00050007
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
PIDFD_OPEN = 434
# CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW,
# SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP
KEPT = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}


def container(unscoped: bool) -> list[tuple[int, int, int, int]]:
    """The filter's steps: code, jump if true, jump if false, operand."""
    machine = os.uname().machine
    steps = [(LOAD, 0, 0, 0)]
    for number in DENIED[machine].values():
        steps += [(JEQ, 0, 1, number), (RET, 0, 0, EPERM)]
    if unscoped:
        steps += [
            (JEQ, 0, 4, LANDLOCK_CREATE),
            (LOAD, 0, 0, 24),
            (JGE, 0, 1, SIZE_WITH_SCOPES),
            (RET, 0, 0, E2BIG),
            (LOAD, 0, 0, 0),
        ]
    steps += [(JEQ, 0, 1, CLONE3), (RET, 0, 0, ENOSYS)]
    steps += [
        (JEQ, 0, 3, CLONE[machine]),
        (LOAD, 0, 0, 16),
        (JSET, 0, 1, 0x7E020000),
        (RET, 0, 0, EPERM),
        (RET, 0, 0, ALLOW),
    ]
    return steps


WITHOUT_PIDFD = [
    (LOAD, 0, 0, 0),
    (JEQ, 0, 1, PIDFD_OPEN),
    (RET, 0, 0, ENOSYS),
    (RET, 0, 0, ALLOW),
]


def main() -> None:
    command = sys.argv[1:]
    option = command.pop(0) if command[0].startswith("--") else ""
    without_pidfd = option == "--no-pidfd"
    steps = WITHOUT_PIDFD if without_pidfd else container(option == "--no-scopes")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    program = b"".join(struct.pack("HBBI", code, jt, jf, k) for code, jt, jf, k in steps)
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)), 16
    )
    if os.geteuid() != 0 and libc.prctl(38, 1, 0, 0, 0):
        raise SystemExit("no_new_privs refused")
    if libc.prctl(22, 2, ctypes.addressof(header), 0, 0):
        raise SystemExit("the filter was refused")
    for capability in range(41):
        if capability not in KEPT and not without_pidfd:
            libc.prctl(24, capability, 0, 0, 0)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
