"""How fast the ranks exchange data within their machines and between them, and how far their clocks
are apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from retool.doctor.finding import Finding
from retool.doctor.machine import Machine
from retool.parallel.collectives import all_gather_flat, gather_objects, reduce_scatter_flat
from retool.parallel.mesh import Mesh
from retool.parallel.network import Place

REPEATS = 3  # the fastest counts
LOOKS = 5  # at the clocks; the least difference counts
MOST_APART_S = 1.0  # of clocks: what is signed or stamped with a time is refused or misread
INSIDE = "in a machine"
BETWEEN = "between machines"
SLOW_GPUS = 1.0  # Gbit/s between machines of GPUs: another network than was meant


@dataclass(frozen=True)
class Link:
    """How ranks exchange data, `ranks` of them in each group and all groups at once.

    Bytes a second that each sends, as a ring would, and seconds of an all-reduce of one number.
    """

    where: str
    ranks: int
    all_reduce: float
    all_to_all: float
    all_gather: float
    reduce_scatter: float
    shortest: float

    @property
    def latency(self) -> float:
        """Seconds of a message: the ring passes as many one after the other."""
        return self.shortest / (2 * (self.ranks - 1))


def clocks(mesh: Mesh, machines: Sequence[Machine]) -> Finding:
    """Differences from rank 0's clock, read when all leave a barrier. Collective."""
    looks = list[list[float]]()
    for _ in range(LOOKS):
        dist.barrier(group=mesh.world_group)
        looks.append(gather_objects(time.time(), mesh.world_group))
    return clock_finding(looks, machines)


def clock_finding(looks: Sequence[Sequence[float]], machines: Sequence[Machine]) -> Finding:
    """Of the ranks' clocks, each time at one moment."""
    # How late a rank leaves the barrier differs from look to look; how far its clock is off doesn't
    ranks = range(len(machines))
    apart = [min(abs(look[r] - look[0]) for look in looks) for r in ranks]
    worst = max(ranks, key=apart.__getitem__)
    who = machines[worst].place.host
    wrong = f"{who}'s differs from {machines[0].place.host}'s: start chrony or ntpd on both."
    late = apart[worst] > MOST_APART_S
    return Finding("clocks", f"at most {1000 * apart[worst]:,.0f} ms apart", wrong if late else "")


def links(mesh: Mesh, machines: Sequence[Machine], megabytes: int) -> list[Link]:
    """Collective: every rank measures, and has the same links."""
    groups = parts_of([machine.place for machine in machines])
    return [
        _measure(mesh, where, parts, megabytes)
        for where, parts in groups.items()
        if len(parts[0]) > 1
    ]


def parts_of(places: Sequence[Place]) -> dict[str, list[list[int]]]:
    """The ranks that exchange data with each other, inside a machine and between machines."""
    # By address, too: clones and containers often have one name
    inside = [
        [rank for rank, other in enumerate(places) if other == place]
        for place in dict.fromkeys(places)
    ]
    groups = {INSIDE: inside}
    if len(inside) > 1:
        most = max(map(len, inside))
        # The first of each machine, the second of each: all its cards use the network at once
        groups[BETWEEN] = [[ranks[i] for ranks in inside if i < len(ranks)] for i in range(most)]
    return groups


def findings(mesh: Mesh, measured: Sequence[Link], megabytes: int) -> list[Finding]:
    """What was measured, as lines of the table."""
    found = list[Finding]()
    for link in measured:
        for name, rate in (
            ("all-reduce", link.all_reduce),
            ("all-to-all", link.all_to_all),
            ("all-gather", link.all_gather),
            ("reduce-scatter", link.reduce_scatter),
        ):
            gbit = 8e-9 * rate
            slow = mesh.device.type == "cuda" and link.where == BETWEEN and gbit < SLOW_GPUS
            way_out = "Slow for GPUs. Name the fast network: NCCL_SOCKET_IFNAME, NCCL_IB_HCA."
            text = f"{gbit:,.1f} Gbit/s from each rank ({megabytes} MB among {link.ranks}, all at once)"
            found.append(Finding(f"{name} {link.where}", text, way_out if slow else ""))
        text = f"{1e6 * link.latency:,.0f} µs a message (an all-reduce of one number)"
        found.append(Finding(f"latency {link.where}", text))
    return found


def _measure(mesh: Mesh, where: str, parts: Sequence[Sequence[int]], megabytes: int) -> Link:
    """The collectives of training, in all parts at once, as training does it."""
    made = [dist.new_group(list(ranks)) for ranks in parts]
    group, size = next(
        (group, len(ranks)) for group, ranks in zip(made, parts, strict=True) if mesh.rank in ranks
    )
    # A whole number for each rank, as the collectives in parts need
    numel = megabytes * 2**20 // 4 // size * size
    data = torch.zeros(numel, device=mesh.device)
    other = torch.empty_like(data)
    number = torch.zeros(1, device=mesh.device)

    def seconds(work: Callable[[], object]) -> float:
        mine = _fastest(mesh, work) if size > 1 else 0.0
        # Training waits for the slowest, so the slowest is the figure; and the same one on all
        # ranks
        return max(gather_objects(mine, mesh.world_group))

    part = torch.zeros(numel // size, device=mesh.device)
    sent = 4 * numel * (size - 1) / size
    link = Link(
        where,
        size,
        all_reduce=2 * sent / seconds(lambda: dist.all_reduce(data, group=group)),
        all_to_all=sent / seconds(lambda: dist.all_to_all_single(other, data, group=group)),
        all_gather=sent / seconds(lambda: all_gather_flat(other, part, group=group)),
        reduce_scatter=sent / seconds(lambda: reduce_scatter_flat(part, data, group=group)),
        shortest=seconds(lambda: dist.all_reduce(number, group=group)),
    )
    for group in made:
        if isinstance(group, dist.ProcessGroup):
            dist.destroy_process_group(group)
    return link


def _fastest(mesh: Mesh, work: Callable[[], object]) -> float:
    """Seconds of the fastest repetition, after one that opens connections."""
    took = list[float]()
    for _ in range(1 + REPEATS):
        begun = time.perf_counter()
        work()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        took.append(time.perf_counter() - begun)
    return min(took[1:])
