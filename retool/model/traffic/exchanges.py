"""Which collectives a training step makes, and the bytes of each: counted, not estimated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from retool.model.build import plan_layout
from retool.model.config import ModelConfig
from retool.model.recompute import Recompute
from retool.parallel.fsdp.buffers import take_turns
from retool.parallel.fsdp.layout import Layout
from retool.parallel.ulysses import HeadPlan

# What a unit of N elements (its padding included), shared by S ranks and replicated R times, costs:
#
#     gathering          all-gather of N in the compute dtype, in the forward and in the backward once
#                        more, unless the unit's buffer still holds it: the last two blocks, and what
#                        has a buffer for itself (all have without reshard_after_forward). The
#                        embedding's backward needs no weights
#     reducing           reduce-scatter of N in the dtype of the reduction, in each micro-batch, or
#                        once in a step where gradients are held. Inside a machine each part goes to
#                        its rank in bf16 or fp16, unless gradients were held
#     replicas (HSDP)    all-reduce of a rank's part of the gradient, N/S in at least fp32, once in a
#                        step
#     sequence (Ulysses) in each layer and micro-batch q, k and v to the heads' ranks and attention's
#                        result back: twice in the forward, twice in the backward, and twice more
#                        where the backward computes the block again
#     experts (ep)       those of a layer are a unit of their own, of which each rank gathers a part,
#                        from the S/ep ranks that share it; in each layer and micro-batch four
#                        all-to-alls (how many tokens, their weights, their rows, the results), three in
#                        the backward, and four more where it computes the block again
#     numbers            the gradient's norm and the loss; of experts how often each was chosen
#
# Of a buffer of B bytes a rank sends (S-1)/S of it in an all-gather or a reduce-scatter, and twice
# that in an all-reduce (Thakur et al., Int. J. High Perform. Comput. Appl. 19, 2005).

Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
Purpose = Literal[
    "gathering", "reducing", "replicas", "sequence", "experts", "numbers", "weight sync"
]
NUMBER_BYTES = 8  # of a norm, or a loss: float64
COUNT_BYTES = 8  # of a number of tokens: int64


@dataclass(frozen=True)
class Plan:
    """What of a run decides its traffic."""

    shards: int  # ranks that share a parameter
    replicas: int = 1  # of these groups
    sp: int = 1
    ep: int = 1  # ranks that divide a layer's experts
    # The share of micro-batches whose documents are divided over the sp ranks: whole ones need no
    # all-to-alls. A part of them counts as that part of each
    divided: float = 1.0
    tokens: int = 16_384  # of a rank, in a micro-batch
    micro_batches: int = 1  # in a step
    recompute: Recompute = "none"
    reshard: bool = True
    hold: bool = False  # gradients are reduced once a step
    # Of an element, as it is gathered and as gradients are reduced
    compute_bytes: int = 2
    reduce_bytes: int = 4
    forward_prefetch: bool = True
    per_machine: int = 1  # ranks of a machine

    @property
    def narrow(self) -> bool:
        """Whether gradients leave in the compute dtype: see `retool.parallel.fsdp.reduce`."""
        nearby = self.per_machine % self.shards == 0
        held = self.hold and self.micro_batches > 1
        return nearby and not held and 2 * self.compute_bytes == self.reduce_bytes == 4

    @property
    def world(self) -> int:
        return self.shards * self.replicas

    @property
    def gradient_bytes(self) -> int:
        """Of an element of a rank's own gradient: at least fp32."""
        return max(self.reduce_bytes, 4)


@dataclass(frozen=True)
class Exchange:
    """A collective, as one rank sees it."""

    purpose: Purpose
    collective: Collective
    ranks: int
    sent: float  # bytes
    # How far its ranks are apart: neighbours, or every so many (replicas)
    stride: int = 1


@dataclass(frozen=True)
class Use:
    """The part in a step of the units at a place, in the order in which they compute. A unit is its
    number in the layout.
    """

    place: int
    units: tuple[int, ...]
    head: bool  # the vocabulary's
    backward: bool
    late: tuple[int, ...]  # whose weights aren't there: their gather starts now
    ahead: tuple[int, ...]  # whose gather starts beside it
    reduces: bool  # its gradients leave when it is done
    completes: bool  # and are added up over the replicas: nothing more comes in this step


def uses(config: ModelConfig, plan: Plan) -> Iterator[Use]:
    """A step, place by place: what `Sharded` does with its buffers, without the tensors."""
    layout = layout_of(config, plan)
    held = _Held(layout, plan.reshard)
    units = units_by_place(layout)
    count = len(units)
    # A tied head is the embedding's unit, used once more
    head = 0 if config.tied else count - 1
    forward = [*range(count - 1 + config.tied), head]
    ends = len(forward) - 1
    for micro_batch in range(plan.micro_batches):
        for number, place in enumerate(forward):
            late = held.lacks(units[place])
            has_next = plan.forward_prefetch and number < ends and place + 1 < count
            ahead = held.lacks(units[place + 1]) if has_next else ()
            yield Use(place, units[place], number == ends, False, late, ahead, False, False)
        last = micro_batch + 1 == plan.micro_batches
        due = plan.shards > 1 and (not plan.hold or last)
        for number, place in reversed([*enumerate(forward)]):
            is_head = number == ends
            late = held.lacks(units[place]) if place > 0 or is_head else ()
            ahead = held.lacks(units[place - 1]) if place > 1 else ()
            # A tied matrix waits for the embedding's gradient
            whole = not (is_head and config.tied)
            completes = last and whole and plan.replicas > 1
            yield Use(place, units[place], is_head, True, late, ahead, due and whole, completes)


def layout_of(config: ModelConfig, plan: Plan) -> Layout:
    return plan_layout(config, plan.shards, plan.ep)


def units_by_place(layout: Layout) -> list[tuple[int, ...]]:
    """The units that are gathered together: a layer's experts are one of their own where ranks
    divide them.
    """
    found: list[list[int]] = [[] for _ in range(layout.units[-1].place + 1)]
    for number, unit in enumerate(layout.units):
        found[unit.place].append(number)
    return [tuple(numbers) for numbers in found]


class _Held:
    """Which unit is in each buffer; what one rank owns alone is there always."""

    def __init__(self, layout: Layout, reshard: bool) -> None:
        own = [not reshard] * len(layout.units)
        self.buffer = take_turns(layout.units, own).taken
        self.holder: dict[int, int] = {}

    def lacks(self, units: Sequence[int]) -> tuple[int, ...]:
        """Which of the units have to be gathered; from now on they are there."""
        missing = []
        for unit in units:
            buffer = self.buffer.get(unit)
            if buffer is not None and self.holder.get(buffer) != unit:
                self.holder[buffer] = unit
                missing.append(unit)
        return tuple(missing)


def gathering(config: ModelConfig, plan: Plan, number: int) -> Exchange:
    """The gather of a unit's weights."""
    unit = layout_of(config, plan).units[number]
    sent = _others(unit.part_numel * plan.compute_bytes, unit.owners)
    return Exchange("gathering", "all-gather", unit.owners, sent, unit.parts)


def reducing(
    config: ModelConfig, plan: Plan, numbers: Sequence[int]
) -> Iterator[tuple[int, Exchange]]:
    """The reduction of the units' gradients, each with its unit; what a rank owns alone isn't reduced."""
    for number in numbers:
        unit = layout_of(config, plan).units[number]
        element = plan.compute_bytes if plan.narrow else plan.reduce_bytes
        sent = _others(unit.part_numel * element, unit.owners)
        collective: Collective = "all-to-all" if plan.narrow else "reduce-scatter"
        if unit.owners > 1:
            yield number, Exchange("reducing", collective, unit.owners, sent, unit.parts)


def adding(config: ModelConfig, plan: Plan, number: int) -> Exchange:
    """What adds a unit's gradients up over the replicas."""
    own = layout_of(config, plan).units[number].shard_numel
    sent = 2 * _others(own * plan.gradient_bytes, plan.replicas)
    return Exchange("replicas", "all-reduce", plan.replicas, sent, plan.shards)


def experts(config: ModelConfig, plan: Plan, backward: bool) -> Iterator[Exchange]:
    """A layer's all-to-alls in a micro-batch's forward or backward that take tokens to the ranks with
    their experts and bring results home, where the router spreads them evenly.
    """
    sizes = config.experts
    if sizes is None or plan.ep == 1:
        return
    rows = _others(plan.tokens * sizes.per_token, plan.ep)
    # A row's weight, which is at least fp32, the row on its way out, and home
    row = config.hidden * plan.compute_bytes
    ways = [rows * max(plan.compute_bytes, 4), rows * row, rows * row]
    how_many = _others(sizes.count * COUNT_BYTES, plan.ep)
    sent = list[float]()
    if not backward:
        sent += [how_many, *ways]
    elif plan.recompute != "none":
        # torch's checkpoint computes no further than to the last tensor that the backward needs
        results_home = plan.recompute != "selective"
        sent += [how_many, *ways[: 2 + results_home]]
    if backward:
        sent += ways
    yield from (Exchange("experts", "all-to-all", plan.ep, size) for size in sent)


def sequence(
    config: ModelConfig,
    plan: Plan,
    backward: bool,
    sp_rank: int = 0,
) -> Iterator[Exchange]:
    """A layer's all-to-alls in a micro-batch's forward or backward, as rank `sp_rank` sends them."""
    if plan.sp == 1 or not plan.divided:
        return
    heads = HeadPlan(
        plan.sp,
        sp_rank,
        config.heads,
        config.kv_heads,
        config.head_dim,
    )
    ways = (heads.to_heads(plan.tokens), heads.to_sequence(plan.tokens))
    sizes = list[int]()
    if not backward or plan.recompute in ("full", "offload"):
        sizes += [_away(sent, sp_rank) for sent, _ in ways]
    if backward:
        # Gradients go where their tensors came from
        sizes += [_away(received, sp_rank) for _, received in ways]
    for size in sizes:
        sent = size * plan.compute_bytes * plan.divided
        yield Exchange("sequence", "all-to-all", plan.sp, sent)


def numbers(config: ModelConfig, plan: Plan) -> Iterator[Exchange]:
    """The norm of the gradient, and the loss; of experts how often each was chosen."""
    sums = [(plan.shards, 1.0), (plan.world, 1.0)]
    sizes = config.experts
    if sizes is not None:
        choices = config.layers * sizes.count
        # The step's tokens, each micro-batch's choices, and what is told of the step
        sums += [(plan.world, 1.0), (plan.world, 2.0 * choices + config.layers)]
        if sizes.balance_coefficient:
            sums += [(plan.world, choices)] * plan.micro_batches
    for ranks, count in sums:
        if ranks > 1:
            sent = 2 * _others(count * NUMBER_BYTES, ranks)
            yield Exchange("numbers", "all-reduce", ranks, sent)


def step_exchanges(config: ModelConfig, plan: Plan, sp_rank: int = 0) -> Iterator[Exchange]:
    """Every collective of a training step, as a rank makes them."""
    for use in uses(config, plan):
        yield from (gathering(config, plan, unit) for unit in (*use.late, *use.ahead))
        if is_block(config, use.place):
            yield from sequence(config, plan, use.backward, sp_rank)
            yield from experts(config, plan, use.backward)
        if use.reduces:
            yield from (exchange for _, exchange in reducing(config, plan, use.units))
        if use.completes:
            yield from (adding(config, plan, unit) for unit in use.units)
    yield from numbers(config, plan)


def sync_exchanges(config: ModelConfig, plan: Plan) -> Iterator[Exchange]:
    """RL's weights to the engines, once a step: every unit is gathered."""
    if plan.shards == 1:
        return
    for unit in layout_of(config, plan).units:
        sent = _others(unit.numel * plan.compute_bytes, plan.shards)
        yield Exchange("weight sync", "all-gather", plan.shards, sent)


def is_block(config: ModelConfig, place: int) -> bool:
    """Whether a layer is there; the others are the embedding and the head."""
    return 1 <= place <= config.layers


def _others(whole: float, ranks: int) -> float:
    return whole * (ranks - 1) / ranks


def _away(sizes: Sequence[int], own: int) -> int:
    """Elements that go to others."""
    return sum(sizes) - sizes[own]
