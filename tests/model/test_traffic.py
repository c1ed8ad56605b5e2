"""The traffic model: its counts against the collectives of real steps, its times against arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from retool.batch import PackedBatch, Sample, pack
from retool.engine import weights
from retool.model.build import ModelOptions, build_decoder, plan_layout
from retool.model.config import Experts, ModelConfig
from retool.model.traffic.exchanges import Exchange, Plan, step_exchanges, sync_exchanges
from retool.model.traffic.layouts import best, on, plans
from retool.model.traffic.machines import Machines
from retool.model.traffic.timeline import Work, expected
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import overlap
from retool.parallel.fsdp import whole as whole_weights
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.sft.step import train_step
from tests.model.decoders import decoder_config
from tests.ranks import run_ranks

Counts = Counter[tuple[str, int, float]]  # (collective, ranks, bytes sent) → how often


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def counted() -> Iterator[Counts]:
    """What this rank sends, by what is handed to torch."""
    counts: Counts = Counter()
    real = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single")}
    gather = overlap.all_gather_flat
    scatter = overlap.reduce_scatter_flat
    parts = overlap.send_parts

    def note(kind: str, group: Any, sent: float) -> None:
        counts[kind, dist.get_world_size(group), sent] += 1

    def ring(whole: torch.Tensor, group: Any) -> float:
        ranks = dist.get_world_size(group)
        return size(whole) * (ranks - 1) / ranks

    def all_gather(out: torch.Tensor, mine: torch.Tensor, group: Any, **named: Any) -> Any:
        note("all-gather", group, ring(out, group))
        return gather(out, mine, group=group, **named)

    def reduce_scatter(out: torch.Tensor, whole: torch.Tensor, group: Any, **named: Any) -> Any:
        note("reduce-scatter", group, ring(whole, group))
        return scatter(out, whole, group=group, **named)

    def send_parts(received: torch.Tensor, flat: torch.Tensor, group: Any) -> Any:
        note("all-to-all", group, ring(flat, group))
        return parts(received, flat, group)

    def all_reduce(x: torch.Tensor, *args: Any, group: Any = None, **named: Any) -> Any:
        note("all-reduce", group, 2 * ring(x, group))
        return real["all_reduce"](x, *args, group=group, **named)

    def all_to_all(out: torch.Tensor, send: torch.Tensor, *sizes: list[int], **named: Any) -> Any:
        # Of equal parts `send_parts` has said it
        if sizes:
            group = named["group"]
            others = sum(sizes[1]) - sizes[1][dist.get_rank(group)]
            note("all-to-all", group, others * send.element_size())
        return real["all_to_all_single"](out, send, *sizes, **named)

    with pytest.MonkeyPatch.context() as patch:
        for module in (overlap, weights, whole_weights):
            patch.setattr(module, "all_gather_flat", all_gather)
        patch.setattr(overlap, "reduce_scatter_flat", reduce_scatter)
        patch.setattr(overlap, "send_parts", send_parts)
        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(dist, "all_to_all_single", all_to_all)
        yield counts


@contextmanager
def evenly_routed() -> Iterator[None]:
    """Every expert gets as many tokens, as the model counts them."""

    def each_in_turn(probs: torch.Tensor, sizes: Experts, _: object = None) -> torch.Tensor:
        choices = torch.arange(len(probs) * sizes.per_token) % sizes.count
        return choices.view(-1, sizes.per_token)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retool.model.experts.layer.chosen_experts", each_in_turn)
        yield


def batches(plan: Plan) -> list[PackedBatch]:
    """In each micro-batch a document of all of a group's tokens, or one for each of its ranks."""
    packs = []
    for number in range(plan.micro_batches):
        documents = 1 if number < plan.divided * plan.micro_batches else plan.sp
        tokens = plan.tokens * plan.sp // documents
        one = Sample(np.arange(tokens, dtype=np.int32) % 61, np.ones(tokens, dtype=bool))
        packs.append(pack([one] * documents, multiple=plan.sp))
    return packs


def sent_by(cases: list[tuple[ModelConfig, Plan]]) -> list[tuple[int, Counts, Counts]]:
    """Of each case this rank's sp rank, what its second step sends, and what a sync does."""
    found = []
    for config, plan in cases:
        mesh = make_mesh(sp=plan.sp, fsdp_size=plan.shards, ep=plan.ep, device="cpu")
        options = ModelOptions(
            param_dtype=torch.bfloat16 if plan.compute_bytes == 2 else None,
            recompute=plan.recompute,
            reshard_after_forward=plan.reshard,
            attn="reference",
        )
        model = build_decoder(config, mesh, options)
        model.master.normal_(std=0.1)
        model.refresh()
        optimizer = AdamW(model, AdamWOptions())
        train = partial(
            train_step,
            model,
            optimizer,
            batches(plan),
            plan.tokens * plan.world,
            1e-3,
            StepTimer(mesh.device),
            plan.hold,
        )
        train()
        with counted() as step, evenly_routed():
            train()
        decoder = weights.make_decoder(config, mesh.device, None, compiled=False)
        with counted() as sync:
            weights.Weights(decoder, None, mesh.device).sync(model)
        found.append((mesh.sp_rank, step, sync))
    return found


def counts_of(exchanges: Iterator[Exchange]) -> Counts:
    return Counter((one.collective, one.ranks, one.sent) for one in exchanges)


EXPERTS = decoder_config(
    4,
    2,
    "qwen3_moe",
    layers=3,
    qk_norm=True,
    experts=Experts(4, 2, width=16, normalised=True, balance_coefficient=0.01),
)
PLAIN = Plan(4, tokens=12, micro_batches=2, compute_bytes=4)
CASES = {
    "fsdp": (decoder_config(4, 2, layers=5), PLAIN),
    "held, kept, tied": (
        decoder_config(4, 2, layers=5, tied=True),
        replace(PLAIN, hold=True, reshard=False),
    ),
    "hsdp, sp 2": (
        decoder_config(3, 3, layers=4),
        replace(PLAIN, shards=2, replicas=2, sp=2, recompute="full"),
    ),
    "whole documents, sp 2": (
        decoder_config(3, 3, layers=2),
        replace(PLAIN, sp=2, divided=0.0),
    ),
    "in bf16": (
        decoder_config(4, 2, layers=3),
        replace(PLAIN, compute_bytes=2, per_machine=4),
    ),
    "in bf16, held": (
        decoder_config(4, 2, layers=3),
        replace(PLAIN, compute_bytes=2, per_machine=4, hold=True),
    ),
    "experts": (EXPERTS, PLAIN),
    "experts, ep 2, hsdp": (EXPERTS, replace(PLAIN, shards=2, replicas=2, ep=2, recompute="full")),
    "experts, ep 2 of 4": (EXPERTS, replace(PLAIN, ep=2, recompute="selective")),
    "experts, ep 4, kept": (EXPERTS, replace(PLAIN, ep=4, reshard=False)),
    "replicas alone, sp 2": (
        decoder_config(3, 3, layers=2),
        replace(PLAIN, shards=1, replicas=4, sp=2, recompute="selective"),
    ),
}


def test_what_a_step_sends_is_what_was_counted() -> None:
    for ranks in run_ranks(sent_by, 4, [*CASES.values()]):
        for (name, (config, plan)), (sp_rank, step, sync) in zip(CASES.items(), ranks, strict=True):
            assert step == counts_of(step_exchanges(config, plan, sp_rank)), name
            assert sync == counts_of(sync_exchanges(config, plan)), name


def totals(counts: Counts) -> dict[tuple[str, int], float]:
    """Bytes by collective and ranks."""
    found: dict[tuple[str, int], float] = {}
    for (kind, ranks, sent), times in counts.items():
        found[kind, ranks] = found.get((kind, ranks), 0.0) + sent * times
    return found


def test_bytes_are_right_where_some_micro_batches_stay_whole() -> None:
    config = decoder_config(3, 3, layers=2)
    plan = replace(PLAIN, sp=2, divided=0.5)
    for sp_rank, step, _ in (
        found for rank in run_ranks(sent_by, 4, [(config, plan)]) for found in rank
    ):
        assert totals(step) == totals(counts_of(step_exchanges(config, plan, sp_rank)))


# --- times ---

NO_LATENCY = Machines(2, 1e6, 1e6, 1e9, latency_inside=0.0, latency_between=0.0)


def test_one_collective_takes_latency_and_bytes() -> None:
    machines = Machines(4, 100.0, 10.0, 1.0, latency_inside=1.0, latency_between=7.0)

    def seconds(kind: str, ranks: int, stride: int = 1) -> float:
        return machines.seconds(Exchange("gathering", kind, ranks, 60.0, stride))  # type: ignore[arg-type]

    assert seconds("all-gather", 4) == 3 * 1 + 60 / 100
    # A ring of eight on two machines: each is left once, by all bytes
    assert seconds("all-gather", 8) == 6 * 1 + 1 * 7 + 60 / 10
    # Four pairs at once share a machine's network
    assert seconds("all-reduce", 2, stride=4) == 2 * 7 + 4 * 60 / 10
    # Of what each of eight sends, 4/7 goes to the other machine
    assert seconds("all-to-all", 8) == pytest.approx(3 * 1 + 4 * 7 + 4 * (60 * 4 / 7) / 10)


def test_what_is_slower_than_computing_is_all_there_is_to_wait_for() -> None:
    config = decoder_config(4, 2, layers=6)
    plan = Plan(4, micro_batches=3, tokens=64)
    exchanges = [*step_exchanges(config, plan)]
    slow = sum(NO_LATENCY.seconds(exchange) for exchange in exchanges)
    nothing = expected(config, plan, NO_LATENCY, Work(0.0, 0.0))
    assert nothing.compute == 0 and nothing.step == pytest.approx(slow)
    long = expected(config, plan, NO_LATENCY, Work(9.0, 9.0, 9.0, 9.0))
    ends = [size for size in map(NO_LATENCY.seconds, exchanges) if size < long.waiting < 9]
    assert ends and long.compute == 3 * 2 * 7 * 9.0
    assert long.share < 0.01, "only what comes before the first unit and after the last"


def test_a_step_by_hand() -> None:
    """Three blocks of one second forward, two back; their weights take 0.5 s, their gradients 4."""
    config = replace(decoder_config(4, 2, layers=3), vocab=1)
    plan = Plan(2, tokens=8, compute_bytes=1, reduce_bytes=8)
    embed, block, *_ = [unit.numel for unit in plan_layout(config, 2).units]
    machines = replace(NO_LATENCY, inside=block)
    edge = embed / block
    found = expected(config, plan, machines, Work(1.0, 2.0))
    assert found.compute == 3 * (1 + 2)
    # Forward: the embedding and the first block come late, all others beside a block. Backward: the
    # last block's gradients leave from 2 to 6, and the first block's weights come behind them. The
    # second's leave from 6.5 to 10.5. The embedding, in whose memory the head was, isn't needed.
    assert found.exposed["gathering"] == pytest.approx(edge / 2 + 0.5 + 2.5)
    # The backward is done at 8.5. The first block's leave until 14.5, and the embedding's behind them.
    assert found.exposed["reducing"] == pytest.approx(6 + 4 * edge)


def test_tokens_wait_for_experts_of_other_ranks() -> None:
    plan = replace(PLAIN, shards=8, ep=4, recompute="full")
    travels = [one for one in step_exchanges(EXPERTS, plan) if one.purpose == "experts"]
    # Of 3 layers in 2 micro-batches: in the forward, again, and in the backward
    assert len(travels) == 3 * 2 * (4 + 4 + 3)
    found = expected(EXPERTS, plan, NO_LATENCY, Work(1.0, 2.0))
    assert found.exposed["experts"] == pytest.approx(sum(map(NO_LATENCY.seconds, travels)))
    assert "experts" not in expected(EXPERTS, PLAIN, NO_LATENCY, Work(1.0, 2.0)).exposed
    sizes = [other.shards for other in plans(plan, per_machine=2)]
    assert set(sizes) == {8}, "a machine's two ranks can't divide the experts by four"


def test_replicas_are_added_up_beside_the_backward() -> None:
    """Three blocks of two seconds back, whose sums over the replicas take three."""
    config = replace(decoder_config(4, 2, layers=3), vocab=1)
    plan = Plan(2, replicas=2, tokens=8)
    embed, block, *_ = [unit.shard_numel for unit in plan_layout(config, 2).units]
    machines = replace(NO_LATENCY, inside=1e15, between=2 * block * 4 / 3)
    found = expected(config, plan, machines, Work(1.0, 2.0))
    # They leave at 2, 4 and 6, and follow each other from 2 to 11; the embedding's is behind them
    assert found.exposed["replicas"] == pytest.approx(11 + 3 * embed / block - 6)


def test_the_better_layout_depends_on_the_network() -> None:
    config = decoder_config(4, 2, layers=6)
    plan = Plan(8, tokens=4096, micro_batches=8)
    slow = Machines(4, 1e9, 1e5, 1e9, 1e-6, 1e-5)
    found = best(config, plan, [slow], 512, lambda _: True)
    assert (found.shards, found.replicas) == (4, 2)
    before = on(config, plan, slow, 512).expected
    after = on(config, found, slow, 512).expected
    assert after.step < before.step and after.exposed["replicas"] > 0
    assert best(config, plan, [slow], 512, lambda other: other == plan) == plan, "nothing else fits"
    even = replace(slow, between=1e12, latency_between=1e-6)
    assert best(config, replace(plan, reshard=False), [even], 512, lambda _: True).shards == 8
