"""Whether a token cache still holds what was written.

Sizes and small files are compared at every opening, all of it once a run.

`report.json` holds the size and SHA-256 of every other file and ends with a hash of itself. A cache
that differs is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retool.files.durable import fsync

REPORT = "report.json"
# Read whole at every opening, so compared at every opening
SMALL = (
    "lengths.npy",
    "trained.npy",
    "rows.npy",
)
LARGE = ("tokens.bin", "mask.bin")
CHECKED = "content_checked.txt"  # the run that last compared everything
READ_BYTES = 1 << 22
# A larger cache, which takes more than a second, is compared while the run goes on
WAIT_FOR_BYTES = 1 << 30


def seal(work: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` beside the finished files of a cache, with their hashes.

    All of it survives a power cut.
    """
    files = {
        name: {"size": (work / name).stat().st_size, "sha256": _digest(work / name)}
        for name in (*SMALL, *LARGE)
    }
    body = json.dumps({"report": dict(report), "files": files})
    (work / REPORT).write_text(f"{body}\n{_hash(body)}\n", encoding="utf-8")
    # The folder last: its entry for a file must not be on the disk before the file is.
    for path in (*(work / name for name in files), work / REPORT, work):
        fsync(path)


def read_report(folder: Path) -> dict[str, Any]:
    """{"report": …, "files": …} of a cache. ValueError where it can't be what was written."""
    try:
        body, _, said = (folder / REPORT).read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
    except OSError as error:
        raise ValueError(f"{REPORT} can't be read: {error.strerror or error}") from error
    if _hash(body) != said:
        raise ValueError(f"{REPORT} was changed")
    return json.loads(body)


def damage(folder: Path, everything: bool) -> str | None:
    """What is wrong with a cache; None if nothing is.

    `everything`: its large files are read, too.
    """
    try:
        files = read_report(folder)["files"]
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
        for name in (*SMALL, *(LARGE if everything else ())):
            if _digest(folder / name) != files[name]["sha256"]:
                return f"{name} holds other bytes than were written"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(str(error.filename)).name} can't be read: {error.strerror or error}"
    return None


def is_small(folder: Path) -> bool:
    """Whether comparing everything is so quick that the run may wait for it."""
    return sum((folder / name).stat().st_size for name in LARGE) <= WAIT_FOR_BYTES


def checked_by_this_run(folder: Path) -> bool:
    """Whether another rank of this run has compared everything already.

    If not, this one is to do it now. Call it under the lock.
    """
    run = _this_run()
    note = folder / CHECKED
    with contextlib.suppress(OSError, ValueError):
        if run is not None and note.read_text(encoding="utf-8") == run:
            return True
    with contextlib.suppress(OSError):  # another user's cache: every rank compares for itself then
        note.write_text(run or "", encoding="utf-8")
    return False


class BackgroundCheck:
    """Compares all of a large cache in a thread.

    `problem` is None until something is found to be wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problem: str | None = None
        self._thread = threading.Thread(
            target=self._compare, name="retool-cache-check", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the end of the comparison."""
        self._thread.join()

    def _compare(self) -> None:
        wrong = damage(self.folder, everything=True)
        if wrong is None:
            return
        (self.folder / REPORT).unlink(missing_ok=True)  # so that the next start makes it again
        self.problem = (
            f"the token cache {self.folder} is damaged ({wrong}), and this run has read from it. "
            "Start the same command again: it makes the cache again and goes on from the last "
            "checkpoint. Checkpoints since this start may have been trained on wrong tokens."
        )


def _this_run() -> str | None:
    """What all ranks of a run on one machine have in common, and other runs haven't.

    That is their launcher; None without one.
    """
    if "WORLD_SIZE" not in os.environ:
        return None
    # A process id comes again: with the time at which the launcher started it is unique on the
    # machine.
    launcher = os.getppid()
    try:
        started = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    named = [
        os.environ.get(name, "")
        for name in (
            "MASTER_ADDR",
            "MASTER_PORT",
            "TORCHELASTIC_RUN_ID",
            "TORCHELASTIC_RESTART_COUNT",
        )
    ]
    return " ".join([str(launcher), started, *named])


def _digest(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            whole.update(block)
    return whole.hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
