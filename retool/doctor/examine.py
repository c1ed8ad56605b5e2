"""Everything that the doctor looks at, in the table's order."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from retool.doctor import folder, machine, network, speed
from retool.doctor.finding import Finding
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import make_mesh
from retool.preflight.machine import check_port, check_rounds

PATIENCE_S = 120.0  # for the other ranks to come
LINGER_S = 1.0  # that rank 0 has to say it, before another's end has the launcher end all


@dataclass(frozen=True)
class Wanted:
    """What is looked at: the run's `folder`, whether the `sandbox` matters, how many `megabytes`
    each rank exchanges, and the `model` whose step is told, with so many `tokens` a rank.
    """

    folder: Path
    sandbox: bool
    megabytes: int = 64
    device: str = "auto"
    model: Path | None = None
    tokens: int = 16_384


def examine(wanted: Wanted) -> list[Finding]:
    """What is found, the same on every rank. Collective over the launcher's processes."""
    faults = [*check_port(os.environ), *check_rounds(os.environ)]
    if faults:
        return [Finding(f.where, "", f"{f.problem} {f.remedy}") for f in faults]
    try:
        mesh = make_mesh(device=wanted.device, timeout_s=PATIENCE_S)
    except (RuntimeError, ValueError) as error:  # torch's DistError among them
        return [_unmet(error)]
    sandbox = wanted.sandbox
    machines = gather_objects(machine.look(mesh.rank, mesh.device, sandbox), mesh.world_group)
    found = machine.findings(machines, sandbox)
    rates = speed.products(mesh)
    found.append(speed.product_finding(machines, rates, mesh.device.type == "cuda"))
    links = list[network.Link]()
    if mesh.world > 1:
        found.append(network.clocks(mesh, machines))
        links = network.links(mesh, machines, wanted.megabytes)
        found += network.findings(mesh, links, wanted.megabytes)
    if wanted.model is not None:
        described = speed.described(machines, links, rates)
        found.append(speed.step_finding(described, mesh.world, wanted.model, wanted.tokens))
    found += folder.findings(mesh, machines, wanted.folder)
    if mesh.world > 1:
        dist.destroy_process_group()
        time.sleep(LINGER_S if mesh.rank else 0)
    return found


def _unmet(error: Exception) -> Finding:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    way_out = (
        f"The ranks can't meet at {address}: {str(error).splitlines()[0]}. Is it reached from every "
        "machine, and does no firewall close ports between them? GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME name the network."
    )
    return Finding("processes", f"rank {os.environ.get('RANK', '0')}", way_out)
