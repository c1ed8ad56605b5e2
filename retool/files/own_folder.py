"""Whether the folder that a run began with is still there: recognised by its inode, not by its
name.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

SECOND_LOOK_S = 0.5  # a network disk may answer wrongly once


class OwnFolder:
    """Remembers the folder that is at `path` now.

    Its open handle keeps the number that tells it from another of the same name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def is_there(self) -> bool:
        """Whether `path` still names it. A disk that doesn't answer isn't a folder that is gone."""
        try:
            now = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        # Stale handles and timeouts of network disks pass; to end a run for one would be a loss
        except OSError:
            return True
        return os.path.samestat(now, os.fstat(self._handle))

    def problem(self) -> str | None:
        """None while it is there; else what happened and what to do, in words for the user."""
        if self.is_there():
            return None
        time.sleep(SECOND_LOOK_S)
        if self.is_there():
            return None
        what = "replaced by another one" if self.path.is_dir() else "removed or renamed"
        return (
            f"the run's folder {self.path} was {what} while the run was using it: nothing more can "
            "be saved there, so the run ends. What was saved went with the folder: put it back "
            "where it was and start the same command again to go on from it."
        )


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest one above it that can be seen to exist."""
    # Not Path.exists, which raises where a folder above may not be looked into
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.exists(p))
