"""How ranks of several machines find each other, and a folder that isn't the same one on all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from retool.config import Fault
from retool.parallel.lost_peer import lost_address
from retool.parallel.mesh import make_mesh
from retool.parallel.network import Place, own_place, unreachable
from retool.preflight.ranks.verdict import verdict
from tests.hosts.network import Host
from tests.hosts.ranks import run_on


def meet(own: Path, shared: Path) -> tuple[list[Fault], list[Fault], float, str]:
    faults, _ = verdict((), os.environ, lambda _: None, 30, own)
    none, _ = verdict((), os.environ, lambda _: None, 30, shared)
    mesh = make_mesh(device="cpu", timeout_s=30)
    total = torch.tensor(float(mesh.rank + 1))
    dist.all_reduce(total, group=mesh.world_group)
    dist.destroy_process_group()
    return list(faults), list(none), float(total), own_place(os.environ).address


def test_ranks_meet_over_the_network_between_the_machines(
    hosts: list[Host], tmp_path: Path
) -> None:
    """The machines' names mean nothing here, and gloo's own choice would be the loopback of each."""
    own = hosts[0].disk
    found = run_on(hosts, meet, own, tmp_path)
    for rank, (faults, none, total, address) in enumerate(found):
        (fault,) = faults
        assert fault.where == f"trainer.default_local_dir={own} (on host-b)"
        assert "isn't the folder that rank 0 has under this name" in fault.problem
        assert none == [] and total == 3.0 and address == hosts[rank].address
    for name in "ab":
        assert [*(own.parent / name).iterdir()] == [], "nothing is left"


def look(addresses: list[str]) -> list[str]:
    own = own_place(os.environ)
    return [place.address for place in unreachable([Place("", a) for a in addresses], own)]


def test_a_machine_whose_cable_is_out_does_not_answer(hosts: list[Host]) -> None:
    addresses = [host.address for host in hosts]
    assert run_on(hosts[:1], look, addresses) == [[]], "nobody listens there, and it answers"
    hosts[1].cut()
    assert run_on(hosts[:1], look, addresses) == [[hosts[1].address]]


def test_the_machine_that_is_gone_is_named() -> None:
    words = "[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [{}]:31154"
    assert lost_address(RuntimeError(words.format("10.77.0.2"))) == "10.77.0.2"
    assert lost_address(RuntimeError(words.format("127.0.0.1"))) is None
    assert lost_address(RuntimeError("NCCL error: remote process exited")) is None
