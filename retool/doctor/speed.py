"""How fast the ranks compute, and how long a step of a model would take here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from retool.doctor.finding import Finding
from retool.doctor.machine import Machine
from retool.doctor.network import BETWEEN, INSIDE, Link
from retool.model.catalogue.families import read_model_config
from retool.model.traffic.exchanges import Plan
from retool.model.traffic.layouts import Layout, best, on
from retool.model.traffic.machines import Machines
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import Mesh

# Of a product of matrices: rows, which is also its columns
SIDE = {"cuda": 8192, "cpu": 512}
REPEATS = 5  # the fastest counts
# Of a product's FLOP/s: what a training step reaches
OF_A_PRODUCT = 0.55
LEAST_SHARE = 0.8  # of the fastest GPU's
DOCUMENT = 4_096  # tokens
NO_OTHER = 1e15  # bytes a second, where there is nobody to send to


def products(mesh: Mesh) -> list[float]:
    """FLOP/s of every rank in a product of matrices, bf16 on GPUs. Collective."""
    kind = mesh.device.type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    matrix = torch.randn(SIDE[kind], SIDE[kind], dtype=dtype, device=mesh.device)
    took = list[float]()
    for _ in range(1 + REPEATS):
        begun = time.perf_counter()
        torch.mm(matrix, matrix)
        if kind == "cuda":
            torch.cuda.synchronize(mesh.device)
        took.append(time.perf_counter() - begun)
    return gather_objects(2 * SIDE[kind] ** 3 / min(took[1:]), mesh.world_group)


def product_finding(machines: Sequence[Machine], rates: Sequence[float], cuda: bool) -> Finding:
    """The slowest and the fastest."""
    slowest = min(range(len(rates)), key=rates.__getitem__)
    least = rates[slowest]
    most = max(rates)
    text = f"{least / 1e12:,.1f} to {most / 1e12:,.1f} TFLOP/s"
    wrong = (
        f"{machines[slowest].name} is slow, and all wait for it. Is it too hot, or used by others? "
        "nvidia-smi shows both."
    )
    slow = cuda and least < LEAST_SHARE * most
    return Finding("product of matrices", text, wrong if slow else "")


def described(
    machines: Sequence[Machine], links: Sequence[Link], rates: Sequence[float]
) -> Machines:
    """What was measured, as the traffic model takes it."""
    first = machines[0].place
    per_machine = sum(machine.place == first for machine in machines)
    known = {link.where: link for link in links}
    inside = known.get(INSIDE)
    between = known.get(BETWEEN)
    # What FSDP does: where several machines share parameters, between them
    shared = between or inside
    return Machines(
        per_machine,
        inside.all_reduce if inside else NO_OTHER,
        # Of a machine: all its ranks sent at once
        between.all_reduce * per_machine if between else NO_OTHER,
        OF_A_PRODUCT * min(rates),
        latency_inside=inside.latency if inside else 0.0,
        latency_between=between.latency if between else 0.0,
        gather=shared.all_reduce / shared.all_gather if shared else 1.0,
        scatter=shared.all_reduce / shared.reduce_scatter if shared else 1.0,
    )


def step_finding(machines: Machines, world: int, folder: Path, tokens: int) -> Finding:
    """What a step of the model in `folder` waits for, with so many tokens on each rank."""
    subject = "a step's network"
    try:
        config = read_model_config(folder)
    except (ValueError, OSError) as error:
        return Finding(subject, "", str(error))
    plan = Plan(world, tokens=tokens, per_machine=machines.per_machine)
    layouts = [on(config, plan, machines, min(DOCUMENT, tokens))]
    better = best(config, plan, [machines], min(DOCUMENT, tokens), lambda _: True)
    if better != plan:
        layouts.append(on(config, better, machines, min(DOCUMENT, tokens)))
    said = "; ".join(map(_in_words, layouts))
    return Finding(subject, f"{folder.name}, {tokens:,} tokens a rank: {said}")


def _in_words(layout: Layout) -> str:
    plan = layout.plan
    kept = "" if plan.reshard else ", reshard_after_forward=false"
    found = layout.expected
    return f"fsdp_size={plan.shards}{kept} waits {found.share:.0%} of {found.step:.2g} s (expected)"
