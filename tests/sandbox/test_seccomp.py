"""The filter's program, run by an interpreter of classic BPF written here from its definition, for
both architectures.
"""

from __future__ import annotations

import errno
import struct

import pytest

from retool.sandbox import seccomp
from retool.sandbox.syscalls import AUDIT_ARCH, LAST_REVIEWED, TABLES

ALLOW = 0x7FFF0000
KILL = 0x80000000
ASK = 0x7FC00000
EPERM = 0x00050000 | errno.EPERM
ENOSYS = 0x00050000 | errno.ENOSYS


def execute(program: bytes, arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """The filter's verdict on one call. struct seccomp_data: nr, arch, instruction pointer, six
    64-bit arguments.
    """
    data = struct.pack(
        "<iIQ6Q",
        number if number < 1 << 31 else number - (1 << 32),
        arch,
        0,
        *(*arguments, *(0,) * (6 - len(arguments))),
    )
    steps = list(struct.iter_unpack("HBBI", program))
    accumulator = index = 0
    while True:
        code, jt, jf, k = steps[index]
        index += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:
            accumulator &= k
        elif code == 0x06:
            return k
        elif code == 0x05:
            index += k
        else:
            true = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[code]
            index += jt if true else jf


EVERYTHING = dict.fromkeys(vars(seccomp.Filter()), True)
FILTERS = [
    seccomp.Filter(),
    seccomp.Filter(**EVERYTHING),
    seccomp.Filter(**{**EVERYTHING, "listener": False}),
    seccomp.Filter(network=False),
]


@pytest.mark.parametrize("machine", TABLES)
@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_verdicts(machine: str, wanted: seccomp.Filter) -> None:
    table = TABLES[machine]
    arch = AUDIT_ARCH[machine]
    program = seccomp.name_owner(seccomp.build(wanted, machine, pid=0x7A7A7A7A), 0x7A7A7A7A, 77)
    asked = ASK if wanted.listener else EPERM

    def verdict(name: str, *arguments: int) -> int:
        return execute(program, arch, table[name], arguments) if name in table else EPERM

    denied = (
        seccomp.PRIVILEGED
        | seccomp.SURFACE
        | seccomp.OTHERS
        | seccomp.HIDDEN_MEMORY
        | seccomp.TRACES
        | seccomp.PRIORITY
    )
    for name in denied & table.keys():
        assert verdict(name) == EPERM, name
    for name in seccomp.NETWORK & table.keys():
        assert verdict(name) == (EPERM if wanted.network else ALLOW), name
    for name in seccomp.METADATA & table.keys():
        assert verdict(name) == (EPERM if wanted.keep_metadata else ALLOW), name
    assert verdict("uname") == (EPERM if wanted.nameless else ALLOW)
    assert verdict("clone3") == ENOSYS
    assert verdict("clone", 17) == verdict("clone", 0x3D0F00) == ALLOW  # a fork, a thread
    for kind in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict("clone", kind | 17) == EPERM
    # Private anonymous; a shared file
    assert verdict("mmap", 0, 4096, 3, 0x22) == ALLOW and verdict("mmap", 0, 4096, 3, 0x01) == ALLOW
    assert verdict("mmap", 0, 4096, 3, 0x21) == verdict("mmap", 0, 4096, 3, 0x23) == EPERM
    assert (
        verdict("prctl", 41, 0) == verdict("prctl", 62, 0) == EPERM
        and verdict("prctl", 15) == ALLOW
    )
    # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ
    for command in (
        8,
        10,
        15,
        1024,
        1026,
        1031,
    ):
        assert verdict("fcntl", 3, command) == EPERM
    assert verdict("fcntl", 3, 4) == verdict("fcntl", 3, 6) == ALLOW  # F_SETFL, F_SETLK
    # Is it a terminal, don't block
    assert verdict("ioctl", 0, 0x5401) == verdict("ioctl", 0, 0x5421) == ALLOW
    # Owners of sockets, file flags, typing into a terminal
    for command in (
        0x8901,
        0x8902,
        0x40086602,
        0x401C5820,
        0x5412,
    ):
        assert verdict("ioctl", 3, command) == EPERM
    stream = (1, 1 | 0o2000000)
    datagram = (1, 2)
    assert verdict("socketpair", *stream) == (
        asked if wanted.count_pairs and wanted.network else ALLOW
    )
    assert (
        verdict("socketpair", *datagram)
        == verdict("socketpair", 2, 1)
        == (EPERM if wanted.network else ALLOW)
    )
    assert verdict("setpgid") == (EPERM if wanted.one_group else ALLOW)
    assert verdict("openat", 0, 0, 0o20200001) == (EPERM if wanted.keep_files else ALLOW)
    assert verdict("openat", 0, 0, 0o100) == ALLOW


@pytest.mark.parametrize("machine", TABLES)
@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_verdicts_on_processes(machine: str, wanted: seccomp.Filter) -> None:
    """A process may ask and change itself; others only where a pid namespace holds none but the
    call's own.
    """
    program = seccomp.build(wanted, machine, pid=77)

    def verdict(name: str, *arguments: int) -> int:
        return execute(program, AUDIT_ARCH[machine], TABLES[machine][name], arguments)

    refused = EPERM if wanted.own_process else ALLOW
    for name, position in seccomp.OWN_PROCESS.items():
        before = (0,) * position
        assert verdict(name, *before, 77) == verdict(name, *before, 0) == ALLOW
        assert verdict(name, *before, 78) == verdict(name, *before, 1) == refused
    for name in ("getpriority", "setpriority"):
        assert verdict(name, 0, 0) == verdict(name, 0, 77) == verdict(name, 1, 0) == ALLOW
        assert verdict(name, 0, 78) == verdict(name, 2, 0) == refused
    for name in ("pidfd_open", "pidfd_send_signal", "rt_tgsigqueueinfo"):
        assert verdict(name, 77) == refused
    for name in seccomp.SIGNALS:
        assert verdict(name, 77) == verdict(name, 0) == verdict(name, -77 & 0xFFFFFFFF) == ALLOW
        expected = (ASK if wanted.listener else EPERM) if wanted.own_process else ALLOW
        assert verdict(name, 78) == verdict(name, 0xFFFFFFFF) == expected


@pytest.mark.parametrize("machine", TABLES)
def test_numbers_out_of_range(machine: str) -> None:
    program = seccomp.build(seccomp.Filter(), machine)
    arch = AUDIT_ARCH[machine]
    for number in (LAST_REVIEWED + 1, 1000, 0x40000000 + 41, 0xFFFFFFFF):
        assert execute(program, arch, number) == ENOSYS
    assert execute(program, 0x40000003, 1) == KILL  # i386 on an x86_64 kernel
    listed = set(TABLES[machine].values())
    for number in set(range(LAST_REVIEWED + 1)) - listed:
        assert execute(program, arch, number) == ALLOW


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_numbers_against_the_kernel_headers(machine: str, header: str) -> None:
    import pathlib
    import re

    path = pathlib.Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"no {path}")
    numbers = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()):
        numbers.setdefault(name, int(number))
    known = {name: number for name, number in TABLES[machine].items() if name in numbers}
    assert len(known) > 90
    assert known == {name: numbers[name] for name in known}
