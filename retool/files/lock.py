"""One run at a time in a folder, one writer of a file: advisory locks that the kernel lets go of when
their process ends, however that is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def keep(file: IO[str] | int) -> bool:
    """Keep an open file, or folder, from every other process that asks likewise, until it is closed;
    False where one has it. Disks that know no such locks are used without.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def sole_user(folder: Path, patience_s: float = 10.0) -> Iterator[None]:
    """Keep every other run out of `folder`, which is made, for as long as this lasts or the process
    lives.

    The run before may just be ending, so it is given `patience_s`. ValueError where it has the
    folder still. Disks that know no such locks (flock of a directory) are used without.
    """
    new = not folder.exists()
    handle = _locked(folder, time.monotonic() + patience_s)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            # Not another run's, which may have been made in the place of this one.
            if new and _is_named(folder, handle) and not any(folder.iterdir()):
                folder.rmdir()
        os.close(handle)


def _locked(folder: Path, end: float) -> int:
    """A handle of the folder with the lock on it. ValueError if another run has it still at `end`."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # Opened for each try: the run before may take its empty folder away, and a lock on that one
        # would keep nobody out of the next.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            if keep(handle) and _is_named(folder, handle):
                return handle
            os.close(handle)
        if time.monotonic() > end:
            raise ValueError("another run is writing there.")
        # flock can't wait for so long and no longer, so it is asked again
        time.sleep(0.2)


def _is_named(folder: Path, handle: int) -> bool:
    """Whether `folder` still names what was opened."""
    return os.path.lexists(folder) and os.path.samestat(os.stat(folder), os.fstat(handle))


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
