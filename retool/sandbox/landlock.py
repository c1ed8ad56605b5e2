"""Landlock: the kernel's own path rules for a process that gives rights away. Files always;
signals, abstract sockets and TCP where the kernel is new enough. Source: Linux
`Documentation/userspace-api/landlock.rst`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from . import kernel

_CREATE = 444
_ADD = 445
_RESTRICT = 446
EXECUTE = 1
WRITE_FILE = 2
READ_FILE = 4
READ_DIR = 8
REMOVE_FILE = 32
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ = EXECUTE | READ_FILE | READ_DIR


def abi() -> int:
    """The kernel's Landlock version; 0 where there is none, it is switched off, or a container's
    filter hides it.
    """
    return max(int(kernel.libc.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))), 0)


def file_rights(version: int) -> int:
    """Every file right that version `version` knows: those not granted are denied."""
    # The first has 13; 2 brought REFER, 3 TRUNCATE and 5 IOCTL_DEV
    count = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    return (1 << count) - 1


def scopes_signals(version: int) -> bool:
    """Signals and abstract sockets can be kept inside (Linux 6.12)."""
    return version >= 6


def open_paths(paths: dict[str, int]) -> list[tuple[int, int]]:
    """(descriptor, rights) for each path that exists, so that children needn't walk to it."""
    opened = []
    for path, rights in paths.items():
        if os.path.exists(path):
            opened.append((os.open(path, os.O_PATH | os.O_CLOEXEC), rights))
    return opened


def restrict(version: int, granted: list[tuple[int, int]], scope: bool) -> None:
    """Deny this thread, and all that it starts, every file but those under the granted descriptors.

    `scope` also keeps signals and abstract sockets inside, and forbids TCP. Needs `no_new_privs`.
    """
    handled = file_rights(version)
    scope = scope and scopes_signals(version)
    attributes = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 3 if scope else 0)
    # A kernel refuses attributes that are larger than it knows
    size = 8
    if version >= 4:
        size = 24 if scope else 16
    ruleset = kernel.check(
        kernel.libc.syscall(_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint(0)),
        "landlock_create_ruleset",
    )
    for descriptor, rights in granted:
        # The kernel refuses a rule on a file that grants what only folders have, such as READ_DIR
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        rule = struct.pack(
            "=Qi", rights & handled & (-1 if is_folder else _FILE_RIGHTS), descriptor
        )
        kernel.check(
            kernel.libc.syscall(
                _ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0)
            ),
            "landlock_add_rule",
        )
    kernel.check(
        kernel.libc.syscall(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0)),
        "landlock_restrict_self",
    )
    # The rules hold without it, and a program that inherits the descriptor has no use for it
    os.close(ruleset)
