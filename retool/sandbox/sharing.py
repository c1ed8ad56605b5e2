"""One sandbox for all processes of a machine that give it the same name: the first one owns it, the
others are guests.

The name lies in the kernel's abstract socket space. Whoever binds it is the owner, and listens; the
kernel frees it when the owner and its supervisor are gone, however they went, and then the next to
ask becomes the owner. Only processes of the same user are served.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import struct

_BACKLOG = 512


def address(name: str, setup: dict[str, object]) -> str:
    """Where processes of this user meet who name a sandbox `name` and want it to be set up alike."""
    told = json.dumps([os.geteuid(), name, setup], sort_keys=True)
    return "\0retool-sandbox-" + hashlib.sha256(told.encode()).hexdigest()[:32]


def claim(where: str) -> socket.socket | None:
    """The listener of the sandbox at `where`, for its owner; None where another process owns it."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return listener


def join(where: str) -> socket.socket | None:
    """A connection to the sandbox at `where`; None where it has just ended.

    ValueError where another user holds the name.
    """
    guest = socket.socket(socket.AF_UNIX)
    try:
        guest.connect(where)
    except OSError:
        guest.close()
        return None
    if (uid := peer(guest)) != os.geteuid():
        guest.close()
        raise ValueError(
            f"uid {uid} holds the name under which the processes of this run share their sandbox: "
            "end that process."
        )
    return guest


def accept(listener: socket.socket) -> socket.socket | None:
    """The next guest; None where it went away again or belongs to another user."""
    try:
        guest = listener.accept()[0]
    except OSError:
        return None
    if peer(guest) != os.geteuid():
        guest.close()
        return None
    return guest


def peer(connected: socket.socket) -> int:
    """The uid at the other end."""
    return struct.unpack("iii", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
