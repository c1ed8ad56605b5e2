"""One run at a time in a folder: an advisory lock that the kernel lets go of when its process ends,
however that is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sole_user(folder: Path, patience_s: float = 10.0) -> Iterator[None]:
    """Keep every other run out of `folder`, which is made, for as long as this lasts or the process
    lives.

    The run before may just be ending, so it is given `patience_s`. ValueError where it has the
    folder still. Disks that know no such locks (flock of a directory) are used without.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError("another run is writing there.") from None
                # flock can't wait for so long and no longer, so it is asked again
                time.sleep(0.2)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            # Not another run's, which may have been made in the place of this one.
            if (
                new
                and os.path.samestat(os.stat(folder), os.fstat(handle))
                and not any(folder.iterdir())
            ):
                folder.rmdir()
        os.close(handle)


def in_use(folder: Path) -> bool:
    """Whether a run has `folder` to itself at this moment. Nothing is made or kept."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared: two that only look don't take each other for a run
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
