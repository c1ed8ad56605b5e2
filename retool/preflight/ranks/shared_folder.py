"""One folder on all machines: every rank writes its own part of a checkpoint into the run's."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torch._C._distributed_c10d import Store

from retool.config import Fault
from retool.files.own_folder import existing_part

PATIENCE_S = 3.0  # that a network disk has to show on one machine what another wrote
KEY = "mark in the folder"
PREFIX = ".retool-same-folder-"


@contextmanager
def same_folder(
    folder: Path, store: Store, rank: int, key: str = "trainer.default_local_dir"
) -> Iterator[tuple[Fault, ...]]:
    """A fault on each rank whose `folder`, or the part of its path that exists, isn't the same as
    rank 0's.

    Rank 0 keeps a file there while this lasts, which the others look for: it must last until they
    have said what they found. Collective over the ranks that share `store`.
    """
    if rank > 0:
        # Waits until rank 0 has said which mark to look for
        yield _missed(folder, store.get(KEY).decode(), f"{key}={folder}")
        return
    with ExitStack() as kept:
        name = ""
        with suppress(OSError):  # it can't be written: a fault of its own
            mark = tempfile.NamedTemporaryFile(dir=existing_part(folder), prefix=PREFIX)  # noqa: SIM115
            name = Path(kept.enter_context(mark).name).name
        store.set(KEY, name)
        yield ()


def _missed(folder: Path, mark: str, setting: str) -> tuple[Fault, ...]:
    if not mark or _appears(folder, mark):
        return ()
    problem = (
        "isn't the folder that rank 0 has under this name: a checkpoint would be in pieces, each on "
        "another machine."
    )
    way_out = "Name a folder on a disk that all machines share, at the same path."
    return (Fault(setting, problem, way_out),)


def _appears(folder: Path, mark: str) -> bool:
    """Whether a file of this name shows in what exists of `folder`, which may appear late itself."""
    end = time.monotonic() + PATIENCE_S
    while not os.path.lexists(existing_part(folder) / mark):
        if time.monotonic() > end:
            return False
        # Listings of network disks are seconds old, so one look is not enough
        time.sleep(0.1)
    return True
