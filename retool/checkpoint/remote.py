"""Copies of finished checkpoints on a remote store, through fsspec: first the files, then their
checksums, the tracker last. A failure never ends the run.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import final

import fsspec

from retool.checkpoint.format.folder import CHECKSUMS
from retool.checkpoint.format.tracker import TRACKER
from retool.config.redact import logger

ATTEMPTS = 4
# At the end of a run a store may be silent for this long, all attempts at a file included, and
# besides for as long as the file at hand takes at this speed.
STALL_S = 300.0
SLOWEST_BYTES_S = 1e6

log = logger("retool.checkpoint")


@final
class Mirror:
    """A thread that copies finished checkpoints to `url`, one after the other.

    What fails is tried again, then reported.
    """

    def __init__(self, url: str, wait_s: float = 5.0) -> None:
        self.url = url
        self._wait_s = wait_s
        self._queue: queue.Queue[Path | None] = queue.Queue()
        self._busy: list[Path] = []
        self._moved = time.monotonic()  # when the file at hand began
        self._current = 0  # its bytes
        self._given_up = False
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._work, name="checkpoint copy", daemon=True)
        self._thread.start()

    def add(self, folder: Path) -> None:
        """Copy `folder` when the earlier ones are done."""
        self._busy.append(folder)
        self._queue.put(folder)

    def busy(self) -> list[Path]:
        """Folders that are still to be copied, and so must not be deleted."""
        return list(self._busy)

    def close(self) -> None:
        """Wait until everything is copied, or given up. A store that takes nothing for `STALL_S` is
        not waited for any longer.
        """
        self._queue.put(None)
        while self._thread.is_alive() and not self._is_stalled():
            self._thread.join(0.2)
        if self._thread.is_alive():
            self._given_up = True
            for folder in self._busy:
                self._fail(folder, "the store takes nothing any more")

    def _is_stalled(self) -> bool:
        patience_s = STALL_S + self._current / SLOWEST_BYTES_S
        return time.monotonic() - self._moved > patience_s

    def _fail(self, folder: Path, why: str) -> None:
        self.failures.append(f"{folder} was not copied to {self.url}: {why}")
        log.error("%s. The local checkpoint is complete.", self.failures[-1])

    def _progress(self, size: int) -> None:
        """A file of this size begins.

        Raises where nobody waits any more: a tracker that comes late may name an older step than
        the next run's.
        """
        if self._given_up:
            raise TimeoutError("given up")
        self._moved = time.monotonic()
        self._current = size

    def _work(self) -> None:
        while (folder := self._queue.get()) is not None:
            try:
                copy(folder, self.url, self._wait_s, self._progress)
            # Any of a dozen stores' own exceptions: training must not die of one.
            except Exception as error:
                if self._given_up:  # and said
                    return
                self._fail(folder, f"{type(error).__name__}: {error}")
            # Whatever came of it: from now on it may be deleted.
            self._busy.remove(folder)


def copy(
    folder: Path, url: str, wait_s: float = 5.0, progress: Callable[[int], None] = lambda size: None
) -> None:
    """Copy a checkpoint folder to `url`/<its name>, then the tracker.

    Each file is tried ATTEMPTS times, `wait_s` · 2ⁿ apart.
    """
    store, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # What vouches for the others follows them: half a copy vouches for nothing.
    files.sort(key=lambda path: path.name == CHECKSUMS)
    for path in files:
        progress(path.stat().st_size)
        inside = path.relative_to(folder).as_posix()
        _put(store, path, f"{root}/{folder.name}/{inside}", wait_s)
    # Last, so that it never names a checkpoint that isn't all there.
    step = folder.name.rpartition("_")[2]
    progress(0)
    _retry(lambda: store.pipe_file(f"{root}/{TRACKER}", step.encode()), f"{url}/{TRACKER}", wait_s)


def _put(store: fsspec.AbstractFileSystem, path: Path, target: str, wait_s: float) -> None:
    def attempt() -> None:
        store.makedirs(target.rpartition("/")[0], exist_ok=True)
        store.put_file(str(path), target)
        # A connection that broke may pass for the end of the file.
        size = store.info(target)["size"]
        if size != path.stat().st_size:
            raise OSError(
                f"{target} has {size} bytes after the copy instead of {path.stat().st_size}"
            )

    _retry(attempt, target, wait_s)


def _retry(action: Callable[[], None], what: str, wait_s: float) -> None:
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if attempt == ATTEMPTS - 1:
                raise
            log.warning(
                "copying to %s failed (%s: %s); trying again.", what, type(error).__name__, error
            )
            time.sleep(wait_s * 2**attempt)
