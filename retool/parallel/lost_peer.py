"""Telling the rank that failed from those that only lost it: the user should read one error, the
first one's.
"""

from __future__ import annotations

import sys
import time

# Words of gloo's and NCCL's errors where a peer is gone
SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "remote process exit",
)
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


def follow(rank: int) -> int:
    """End a rank that has lost another: leave that one the time to be seen first, then say one line.

    Returns the exit status.
    """
    time.sleep(LINGER_S)
    said = (
        f"rank {rank} ends because another rank is gone: what that one said, or how the launcher says it "
        "ended, is the error."
    )
    print(said, file=sys.stderr, flush=True)
    return 1
