"""Checks of the run's folder: whether it is the same on all machines, can be written, and shows
renames to all.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from retool.doctor.finding import Finding
from retool.doctor.machine import Machine
from retool.files.own_folder import existing_part
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import Mesh

PATIENCE_S = 3.0  # that a network disk has to show what another machine did


def findings(mesh: Mesh, machines: Sequence[Machine], folder: Path) -> list[Finding]:
    """Collective. Every rank makes a file, renames it, and looks for everybody's."""
    where = existing_part(folder)
    mine = ""
    wrong = ""
    try:
        handle, mine = tempfile.mkstemp(prefix=".retool-doctor-", dir=where)
        os.close(handle)
    except OSError as error:
        wrong = error.strerror or str(error)
    try:
        names = [Path(name).name for name in gather_objects(mine, mesh.world_group)]
        unseen = [rank for rank, name in enumerate(names) if not _shows(where, name)]
        _meet(mesh)
        if mine:
            Path(mine).rename(f"{mine}-renamed")
        _meet(mesh)
        stale = [r for r, name in enumerate(names) if not _shows(where, name and f"{name}-renamed")]
        _meet(mesh)
    finally:
        for left in (mine, f"{mine}-renamed") if mine else ():
            with contextlib.suppress(OSError):
                Path(left).unlink()
    said = gather_objects((wrong, unseen, stale), mesh.world_group)
    return _findings(where, machines, said)


def _findings(
    where: Path, machines: Sequence[Machine], said: Sequence[tuple[str, list[int], list[int]]]
) -> list[Finding]:
    refused = list[str]()
    # Several ranks are on a host, which is named once
    lost: dict[str, None] = {}
    late: dict[str, None] = {}
    for machine, (wrong, unseen, stale) in zip(machines, said, strict=True):
        if wrong:
            refused.append(f"{machine.name}: {wrong}")
        if unseen:
            lost[machine.place.host] = None
        elif stale:
            late[machine.place.host] = None
    apart = f"A file that one machine writes doesn't appear on {', '.join(lost)}: mount one disk at this path on all."
    renames = (
        f"A rename isn't seen within {PATIENCE_S:g} s on {', '.join(late)}: checkpoints get their "
        "name by one."
    )
    named = f"{where}, by all ranks"
    return [
        Finding("folder: writable", named, f"Not by {'; '.join(refused)}." if refused else ""),
        Finding("folder: shared", named, apart if lost else ""),
        Finding("folder: renames show", named, renames if late else ""),
    ]


def _shows(where: Path, name: str) -> bool:
    """Whether a file appears in time; one that couldn't be made isn't waited for."""
    end = time.monotonic() + PATIENCE_S
    while name and not os.path.lexists(where / name):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _meet(mesh: Mesh) -> None:
    if mesh.world_group is not None:
        dist.barrier(group=mesh.world_group)
