"""The traffic model on two machines whose network is shaped: what is sent, and what a step waits for."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.autograd import Function

from retool.doctor.machine import look
from retool.doctor.network import links
from retool.doctor.speed import described
from retool.model.block import Block
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import ModelConfig
from retool.model.traffic.exchanges import Plan, step_exchanges
from retool.model.traffic.machines import Machines
from retool.model.traffic.timeline import Expected, Work, expected
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import make_mesh
from retool.sft.loss import loss_sum
from tests.hosts.network import network
from tests.hosts.ranks import run_on
from tests.model.decoders import decoder_config
from tests.model.test_traffic import batches
from tests.ranks import run_ranks

FORWARD_S = (
    0.03  # that a block computes: it sleeps, so that other work on this computer isn't in the way
)
BACKWARD_S = 0.06
STEPS = 4  # of which the first isn't counted
MEGABYTES = 16  # of an all-reduce that measures the network
GLOO_SCATTER = 2.0  # its reduce-scatter is an all-reduce


class Slow(Function):
    """Identity, whose backward takes a while."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(FORWARD_S)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        time.sleep(BACKWARD_S)
        return grads[0]


def model() -> ModelConfig:
    return decoder_config(8, 8, "llama", layers=6, hidden=512, ffn=1024, head_dim=64)


class Measured(NamedTuple):
    """Seconds of a step without its update, bytes that left the machine in one, and the machines as
    `retool doctor` measures them.
    """

    step: float
    sent: float
    machines: Machines | None


def left_machine() -> int:
    """Bytes that this machine's network has sent, all headers among them."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    found = [line for line in lines if "eth0:" in line]
    return int(found[0].split(":")[1].split()[8]) if found else 0


def measured(plan: Plan) -> Measured:
    """On this rank: the median step."""
    real = Block.forward

    def forward(self: Block, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        slow: Any = Slow.apply(real(self, x, *rest))
        return slow

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", forward)
        mesh = make_mesh(sp=plan.sp, fsdp_size=plan.shards, device="cpu")
        sharded = build_decoder(model(), mesh, ModelOptions(attn="reference"))
        sharded.master.normal_(std=0.02)
        took = list[float]()
        sent = list[int]()
        for _ in range(STEPS):
            sharded.refresh()
            sharded.zero_grad()
            if mesh.world_group is not None:
                dist.barrier(group=mesh.world_group)
            before = left_machine()
            begun = time.perf_counter()
            packs = batches(plan)
            for number, batch in enumerate(packs, 1):
                last = number == len(packs)
                with sharded.last_backward() if last else nullcontext():
                    loss_sum(sharded, batch).backward()
            sharded.finish_gradients()
            sharded.grad_norm()
            took.append(time.perf_counter() - begun)
            if mesh.world_group is not None:
                dist.barrier(group=mesh.world_group)
            sent.append(left_machine() - before)
    found = None
    if mesh.world_group is not None:
        machines = gather_objects(look(mesh.rank, mesh.device, False), mesh.world_group)
        found = described(machines, links(mesh, machines, MEGABYTES), [1.0])
        dist.destroy_process_group()
    return Measured(median(took[1:]), median(sent[1:]), found)


def alone(plan: Plan) -> float:
    """The same on one process: nothing is sent."""
    return measured(replace(plan, shards=1, replicas=1, sp=1)).step


def predicted(plan: Plan, machines: Machines, compute: float) -> Expected:
    """By the model; `compute` is a step without a network."""
    config = model()
    sleeps = config.layers * plan.micro_batches * (FORWARD_S + BACKWARD_S)
    other = (compute - sleeps) / (3 * config.layers * plan.micro_batches)
    work = Work(FORWARD_S + other, BACKWARD_S + 2 * other)
    return expected(config, plan, machines, work)


FSDP = Plan(2, tokens=16, micro_batches=1, compute_bytes=4)
HYBRID = replace(FSDP, replicas=2)


def leaving(plan: Plan) -> float:
    """Bytes that leave a machine in a step, of all its ranks."""
    total = 0.0
    machines = Machines(plan.world // 2, 1.0, 1.0, 1.0)
    for one in step_exchanges(model(), plan):
        if machines.spans(one):
            scatter = GLOO_SCATTER if one.collective == "reduce-scatter" else 1.0
            groups = machines.per_machine if one.purpose == "replicas" else 1
            total += one.sent * scatter * groups
    return total


def sums_over_replicas(plan: Plan, machines: Machines) -> float:
    """Seconds that they take one after the other."""
    exchanges = step_exchanges(model(), plan)
    return sum(machines.seconds(one) for one in exchanges if one.purpose == "replicas")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_step_sends_and_waits_for_on_a_shaped_network(tmp_path: Path) -> None:
    """Bandwidth is shaped, latency isn't: this kernel may lack `netem`."""
    rows = [
        "| layout | Gbit/s | MB sent | predicted | step, s | predicted | waits, s | predicted |"
    ]
    with network(2, tmp_path / "machines") as hosts:
        for name, plan in (("FSDP", FSDP), ("HSDP", HYBRID)):
            ranks = [host for host in hosts for _ in range(plan.world // 2)]
            (compute,) = run_ranks(alone, 1, plan)
            for gbit in (10.0, 1.0):
                for host in hosts:
                    host.shape(gbit)
                found = run_on(ranks, measured, plan)[0]
                assert found.machines is not None
                model_says = predicted(plan, found.machines, compute)
                megabytes = [found.sent / 1e6, leaving(plan) / 1e6]
                seconds = [found.step, model_says.step, found.step - compute, model_says.waiting]
                words = [f"{number:.1f}" for number in megabytes]
                words += [f"{number:.2f}" for number in seconds]
                rows.append(f"| {name} | {gbit:g} | {' | '.join(words)} |")
                assert megabytes[0] == pytest.approx(megabytes[1], rel=0.02), rows
                # gloo's sum over replicas starts when its unit's buffer is needed again, up to two
                # units after the reduction
                late = sums_over_replicas(plan, found.machines)
                assert 0.7 * model_says.step <= found.step, rows
                assert found.step <= 1.3 * (model_says.step + late), rows
    print("\n".join(rows))
