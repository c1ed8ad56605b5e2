"""Tells the rank that failed from those that only lost it: the user should read one error, the
first one.
"""

from __future__ import annotations

import re
import sys
import time

from retool.parallel.network import interface_of

# Words of gloo's and NCCL's errors where a peer is gone
SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exit",
)
# How gloo writes the other end of a connection
PEER = re.compile(r"\[([0-9A-Fa-f.:%]+)\]:\d+")
# Seconds that a rank which lost another stays: a launcher takes the first process that ends for the
# cause, and looks every tenth of a second
LINGER_S = 2.0


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone.

    By its words: torch has no class for it.
    """
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "NCCL" in text)
        and any(sign in text for sign in SIGNS)
    )


def lost_address(error: BaseException) -> str | None:
    """The other machine's address, where gloo's words name one that isn't this machine's."""
    found = PEER.search(str(error))
    return found[1] if found and interface_of(found[1]) is None else None


def follow(rank: int, error: BaseException) -> int:
    """End a rank that has lost another: leave that one the time to be seen first, then say one line.

    Returns the exit status.
    """
    time.sleep(LINGER_S)
    address = lost_address(error)
    where = f" on the machine at {address}" if address else ""
    said = (
        f"rank {rank} ends because another rank{where} is gone. The error is what that one said, or what "
        "the launcher says of its end."
    )
    print(said, file=sys.stderr, flush=True)
    return 1
