"""Messages between the processes of the sandbox: a length, then JSON; descriptors travel beside one
byte.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from typing import Any

HEADER = struct.Struct("!I")


def encode(message: dict[str, Any]) -> bytes:
    """One frame. ASCII escapes carry lone surrogates, which a program may contain, unharmed."""
    body = json.dumps(message).encode("ascii")
    return HEADER.pack(len(body)) + body


class Frames:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages completed by `data`, in order."""
        self._pending += data
        messages = []
        while len(self._pending) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._pending)
            if len(self._pending) < HEADER.size + length:
                break
            messages.append(json.loads(self._pending[HEADER.size : HEADER.size + length]))
            del self._pending[: HEADER.size + length]
        return messages


def read_frame(fd: int) -> dict[str, Any] | None:
    """One message from a blocking descriptor; None at its end."""
    head = _read_exactly(fd, HEADER.size)
    if head is None:
        return None
    body = _read_exactly(fd, HEADER.unpack(head)[0])
    return None if body is None else json.loads(body)


def _read_exactly(fd: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def receive_with_credentials(
    sock: socket.socket, size: int = 4096, descriptors: int = 8
) -> tuple[bytes, list[int], int]:
    """Data, descriptors, and the sender's pid as the kernel translates it into this process's pid
    namespace (0: not given).
    """
    space = socket.CMSG_SPACE(descriptors * 4) + socket.CMSG_SPACE(12)
    data, ancillary, _, _ = sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    received: array.array[int] = array.array("i")
    pid = 0
    for level, kind, value in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            # A message cut short may end within a number
            received.frombytes(value[: len(value) - len(value) % 4])
        elif kind == socket.SCM_CREDENTIALS:
            pid = struct.unpack("iii", value)[0]
    return data, list(received), pid
