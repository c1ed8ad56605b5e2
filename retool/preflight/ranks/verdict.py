"""One verdict of all ranks on all machines before there is a process group: a fault that one rank
sees stops all of them, said once.

Ranks meet in the launcher's store (torchrun's own, or one that rank 0 opens at MASTER_PORT), which
needs no GPU and no NCCL.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistError

from retool.config import Fault
from retool.parallel.meeting import meeting_place
from retool.preflight.ranks.alike import Shared, unlike, who
from retool.preflight.ranks.shared_folder import same_folder

TIMEOUT = 1800.0  # seconds: another machine may still be reading its data
LINGER = (
    10.0  # seconds that rank 0, which may host the store, stays for the others to read the verdict
)
# seconds that the others leave rank 0 to end first, with its own status: a launcher ends the rest
# then
HEAD_START = 1.0


# A program may start several runs: they meet in the same store, which forgets nothing
_numbers = itertools.count()
_stores: list[Store] = []
Show = Callable[[Sequence[Fault]], None]


def verdict(
    mine: Sequence[Fault],
    environment: Mapping[str, str],
    show: Show,
    timeout_s: float = TIMEOUT,
    folder: Path | None = None,
    shared: Sequence[Shared] = (),
) -> tuple[tuple[Fault, ...], Any]:
    """(the faults of all ranks, an object that keeps the store open until there is a process
    group).

    Collective over the launcher's processes. `folder` must be the same one on all machines, and
    `shared` has what else must be alike.

    Where not all ranks have a fault, it says which. One rank shows them, before any other can end
    and have the launcher end all. A rank that can't meet the others shows its own faults, and that.
    """
    rank = int(environment.get("RANK", 0))
    world = int(environment.get("WORLD_SIZE", 1))
    found = tuple(mine)
    store = None
    try:
        # Another program's port is no place to meet
        if world > 1 and not any(fault.where.startswith("MASTER_PORT=") for fault in mine):
            # One store for the life of the process: its port can't be opened twice.
            if not _stores:
                _stores.append(meeting_place(environment, timeout_s))
            store = _stores[0]
            # A store forgets nothing: without a number of its own, a second run would read the
            # first one's verdict.
            meeting = PrefixStore(f"retool/preflight {next(_numbers)}", store)
            with _agreed_on(folder, meeting, rank) as missed:
                said = _Said((*mine, *missed), tuple(shared))
                return _exchange(said, meeting, rank, world, show), store
    except (DistError, ValueError) as error:
        problem = f"can't meet the other ranks: {str(error).splitlines()[0]}."
        found = (*found, Fault(f"rank {rank}", problem, "See what they, or the launcher, said."))
    if found:
        show(found)
    return found, store


def _agreed_on(
    folder: Path | None, store: Store, rank: int
) -> contextlib.AbstractContextManager[tuple[Fault, ...]]:
    if folder is None:
        return contextlib.nullcontext(())
    return same_folder(folder, store, rank)


@dataclass(frozen=True)
class _Said:
    """What a rank says of itself: its faults, and what it must have in common with the others."""

    faults: tuple[Fault, ...]
    shared: tuple[Shared, ...]

    def packed(self) -> str:
        faults = [_parts(fault) for fault in self.faults]
        shared = [[one.where, one.name, one.value, one.way_out] for one in self.shared]
        return json.dumps([socket.gethostname(), faults, shared])


def _unpacked(text: bytes) -> tuple[str, _Said]:
    host, faults, shared = json.loads(text)
    said = _Said(
        tuple(Fault(*parts) for parts in faults), tuple(Shared(*parts) for parts in shared)
    )
    return host, said


def _parts(fault: Fault) -> list[str]:
    return [fault.where, fault.problem, fault.remedy]


def _exchange(mine: _Said, store: Store, rank: int, world: int, show: Show) -> tuple[Fault, ...]:
    """Rank 0 collects, judges and shows; the others read what it found."""
    store.set(f"faults {rank}", mine.packed())
    if rank > 0:
        found = [Fault(*parts) for parts in json.loads(store.get("verdict"))]
        store.add("read", 1)
        time.sleep(HEAD_START if found else 0)
        return tuple(found)
    found = _judged([_unpacked(store.get(f"faults {r}")) for r in range(world)])
    if found:
        show(found)
    store.set("verdict", json.dumps([_parts(fault) for fault in found]))
    end = time.monotonic() + LINGER
    # Where the run goes on nobody needs to wait: the store stays open.
    while found and store.add("read", 0) < world - 1 and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _judged(said: Sequence[tuple[str, _Said]]) -> tuple[Fault, ...]:
    """The faults of all ranks, and what they don't have in common. `said` is by rank."""
    hosts = [host for host, _ in said]
    faults = merge(hosts, [one.faults for _, one in said])
    known = {fault.where.partition("=")[0].partition(" (")[0] for fault in faults}
    return (*faults, *unlike(hosts, [one.shared for _, one in said], known))


def met_before() -> bool:
    """Whether the ranks have met already, for an earlier run of this process."""
    return bool(_stores)


def merge(hosts: Sequence[str], faults: Sequence[Sequence[Fault]]) -> tuple[Fault, ...]:
    """Each fault once; with the ranks, or the machines, that have it where others don't."""
    owners: dict[Fault, list[int]] = {}
    for rank, own in enumerate(faults):
        for fault in dict.fromkeys(own):
            owners.setdefault(fault, []).append(rank)
    return tuple(
        fault
        if len(ranks) == len(hosts)
        else Fault(f"{fault.where} ({who(ranks, hosts)})", fault.problem, fault.remedy)
        for fault, ranks in owners.items()
    )
