"""How fast the ranks exchange data within their machines and between them, and how far their clocks
are apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from retool.doctor.finding import Finding
from retool.doctor.machine import Machine
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import Mesh

REPEATS = 3  # the fastest counts
LOOKS = 5  # at the clocks; the least difference counts
MOST_APART_S = 1.0  # of clocks: what is signed or stamped with a time is refused or misread
SLOW_GPUS = 1.0  # Gbit/s between machines of GPUs: another network than was meant


def findings(mesh: Mesh, machines: Sequence[Machine], megabytes: int) -> list[Finding]:
    """Collective: every rank measures, and has the same findings."""
    found = [_clocks(mesh, machines)]
    hosts = [machine.place.host for machine in machines]
    names = list(dict.fromkeys(hosts))
    inside = [[r for r, host in enumerate(hosts) if host == name] for name in names]
    groups = {"in a machine": inside}
    if len(names) > 1:
        most = max(map(len, inside))
        across = [[ranks[i] for ranks in inside if i < len(ranks)] for i in range(most)]
        groups["between machines"] = across
    for where, parts in groups.items():
        if len(parts[0]) > 1:
            found += _exchanges(mesh, where, parts, megabytes)
    return found


def _exchanges(
    mesh: Mesh, where: str, parts: Sequence[Sequence[int]], megabytes: int
) -> list[Finding]:
    """All-reduce and all-to-all in all parts at once, as training does it."""
    made = [dist.new_group(list(ranks)) for ranks in parts]
    group, size = next(
        (group, len(ranks)) for group, ranks in zip(made, parts, strict=True) if mesh.rank in ranks
    )
    numel = megabytes * 2**20 // 4 // size * size
    data = torch.zeros(numel, device=mesh.device)
    other = torch.empty_like(data)
    share = (size - 1) / size
    works: dict[str, tuple[float, Callable[[], object]]] = {
        "all-reduce": (2 * share, lambda: dist.all_reduce(data, group=group)),
        "all-to-all": (share, lambda: dist.all_to_all_single(other, data, group=group)),
    }
    found = list[Finding]()
    for name, (sent, work) in works.items():
        seconds = max(gather_objects(_fastest(mesh, work) if size > 1 else 0.0, mesh.world_group))
        rate = 8e-9 * 4 * numel * sent / seconds
        slow = mesh.device.type == "cuda" and where != "in a machine" and rate < SLOW_GPUS
        way_out = "Slow for GPUs. Name the fast network: NCCL_SOCKET_IFNAME, NCCL_IB_HCA."
        text = f"{rate:,.1f} Gbit/s from each rank ({megabytes} MB among {size}, all at once)"
        found.append(Finding(f"{name} {where}", text, way_out if slow else ""))
    for group in made:
        if isinstance(group, dist.ProcessGroup):
            dist.destroy_process_group(group)
    return found


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


def _clocks(mesh: Mesh, machines: Sequence[Machine]) -> Finding:
    """Differences from rank 0's clock, read when all leave a barrier."""
    looks = list[list[float]]()
    for _ in range(LOOKS):
        dist.barrier(group=mesh.world_group)
        looks.append(gather_objects(time.time(), mesh.world_group))
    apart = [min(abs(look[r] - look[0]) for look in looks) for r in range(mesh.world)]
    worst = max(range(mesh.world), key=apart.__getitem__)
    who = machines[worst].place.host
    wrong = f"{who}'s differs from {machines[0].place.host}'s: start chrony or ntpd on both."
    late = apart[worst] > MOST_APART_S
    return Finding("clocks", f"at most {1000 * apart[worst]:,.0f} ms apart", wrong if late else "")
