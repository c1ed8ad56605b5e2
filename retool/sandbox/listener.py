"""The supervisor's answers to a program's filter: system calls that are fine for some arguments and
wait until somebody has judged.

Only numbers are judged, never memory that the program could change meanwhile, so the kernel may go
on with the call as it is. Source: Linux `Documentation/userspace-api/seccomp_filter.rst`,
"Userspace Notification".
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass

from .syscalls import TABLES, machine

_RECEIVE = 0xC0502100
_SEND = 0xC0182101
_GO_ON = 1
USUAL_BUFFER = 212992  # bytes that a socket may have under way, where the kernel doesn't say
# id, pid, flags; number, architecture, instruction pointer, arguments
_REQUEST = struct.Struct("<QIIiIQ6Q")
_ANSWER = struct.Struct("<QqiI")  # id, value, error, flags
_NAMES = {TABLES[machine()][name]: name for name in ("socketpair", "kill", "tkill", "tgkill")}


@dataclass(frozen=True)
class Question:
    """A system call that waits for the answer.

    `pid` is the caller as this process's pid namespace has it.
    """

    number: int
    pid: int
    call: str
    arguments: tuple[int, ...]

    @property
    def target(self) -> int:
        """The process that a signal is for."""
        value = self.arguments[0] & 0xFFFFFFFF
        return value - (1 << 32) if value >> 31 else value


def answer(descriptor: int, allowed: Callable[[Question], bool]) -> bool:
    """Take one question from a listener and answer it: the call goes on, or is not permitted.

    False once nobody is left who could ask.
    """
    if not is_asking(descriptor):
        return False  # to receive would wait for ever
    room = bytearray(_REQUEST.size)
    with contextlib.suppress(OSError):  # who asked has ended meanwhile
        fcntl.ioctl(descriptor, _RECEIVE, room)
        number, pid, _, call, _, _, *arguments = _REQUEST.unpack(room)
        question = Question(number, pid, _NAMES.get(call, ""), tuple(arguments))
        verdict = (0, _GO_ON) if allowed(question) else (-errno.EPERM, 0)
        fcntl.ioctl(descriptor, _SEND, _ANSWER.pack(number, 0, *verdict))
    return True


def is_asking(descriptor: int) -> bool:
    """Whether a question waits; a listener whose programs have all ended can be read from, too, but
    says nothing.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def pair_bytes() -> int:
    """What the buffers of one socket pair may hold: either way as much as its sender may have under
    way, and one piece beyond.
    """
    one_way = USUAL_BUFFER
    with (
        contextlib.suppress(OSError, ValueError),
        open("/proc/sys/net/core/wmem_default", encoding="ascii") as file,
    ):
        one_way = int(file.read())
    return 2 * (one_way + (64 << 10))
