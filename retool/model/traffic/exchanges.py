"""Which collectives a training step makes, and the bytes of each: counted, not estimated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from retool.model.build import plan_layout
from retool.model.config import ModelConfig
from retool.model.recompute import Recompute
from retool.parallel.fsdp.buffers import assign_buffers
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
#     numbers            the gradient's norm and the loss
#
# Of a buffer of B bytes a rank sends (S-1)/S of it in an all-gather or a reduce-scatter, and twice
# that in an all-reduce (Thakur et al., Int. J. High Perform. Comput. Appl. 19, 2005).

Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]
Purpose = Literal["gathering", "reducing", "replicas", "sequence", "numbers", "weight sync"]
NUMBER_BYTES = 8  # of a norm, or a loss: float64


@dataclass(frozen=True)
class Plan:
    """What of a run decides its traffic."""

    shards: int  # ranks that share a parameter
    replicas: int = 1  # of these groups
    sp: int = 1
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
    """A unit's part in a step, in the order in which units compute."""

    unit: int
    head: bool  # the vocabulary's
    backward: bool
    late: bool  # its weights aren't there: their gather starts now
    ahead: int | None  # whose gather starts beside it
    reduces: bool  # its gradients leave when it is done
    completes: bool  # and are added up over the replicas: nothing more comes in this step

    @property
    def gathers(self) -> Iterator[int]:
        """Units whose gather starts here."""
        if self.late:
            yield self.unit
        if self.ahead is not None:
            yield self.ahead


def uses(config: ModelConfig, plan: Plan) -> Iterator[Use]:
    """A step, unit by unit: what `Sharded` does with its buffers, without the tensors."""
    layout = plan_layout(config, plan.shards)
    held = _Held(layout, plan.reshard)
    count = len(layout.units)
    # A tied head is the embedding's unit, used once more
    last = 0 if config.tied else count - 1
    forward = [*range(count - 1 + config.tied), last]
    ends = len(forward) - 1
    for micro_batch in range(plan.micro_batches):
        for place, unit in enumerate(forward):
            late = held.lacks(unit)
            has_next = plan.forward_prefetch and place < ends and unit + 1 < count
            following = unit + 1 if has_next else None
            ahead = following if held.lacks(following) else None
            yield Use(unit, place == ends, False, late, ahead, False, False)
        last = micro_batch + 1 == plan.micro_batches
        due = plan.shards > 1 and (not plan.hold or last)
        for place, unit in reversed([*enumerate(forward)]):
            head = place == ends
            late = (unit > 0 or head) and held.lacks(unit)
            before = unit - 1 if unit > 1 else None
            ahead = before if held.lacks(before) else None
            # A tied matrix waits for the embedding's gradient
            whole = not (head and config.tied)
            completes = last and whole and plan.replicas > 1
            yield Use(unit, head, True, late, ahead, due and whole, completes)


class _Held:
    """Which unit is in each buffer; with one shard all are there always."""

    def __init__(self, layout: Layout, reshard: bool) -> None:
        sizes = [unit.numel for unit in layout.units]
        self.buffer = assign_buffers(sizes, [not reshard] * len(sizes))
        self.holder: dict[int, int] = {}
        self.shared = layout.shards > 1

    def lacks(self, unit: int | None) -> bool:
        """Whether a unit has to be gathered; from now on it is there."""
        if unit is None or not self.shared:
            return False
        buffer = self.buffer[unit]
        missing = self.holder.get(buffer) != unit
        self.holder[buffer] = unit
        return missing


def gathering(config: ModelConfig, plan: Plan, unit: int) -> Exchange:
    """The gather of a unit's weights."""
    numel = plan_layout(config, plan.shards).units[unit].numel
    sent = _others(numel * plan.compute_bytes, plan.shards)
    return Exchange("gathering", "all-gather", plan.shards, sent)


def reducing(config: ModelConfig, plan: Plan, unit: int) -> Exchange:
    """The reduction of a unit's gradients."""
    numel = plan_layout(config, plan.shards).units[unit].numel
    if plan.narrow:
        sent = _others(numel * plan.compute_bytes, plan.shards)
        return Exchange("reducing", "all-to-all", plan.shards, sent)
    sent = _others(numel * plan.reduce_bytes, plan.shards)
    return Exchange("reducing", "reduce-scatter", plan.shards, sent)


def adding(config: ModelConfig, plan: Plan, unit: int) -> Exchange:
    """What adds a unit's gradients up over the replicas."""
    own = plan_layout(config, plan.shards).units[unit].shard_numel
    sent = 2 * _others(own * plan.gradient_bytes, plan.replicas)
    return Exchange("replicas", "all-reduce", plan.replicas, sent, plan.shards)


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


def numbers(plan: Plan) -> Iterator[Exchange]:
    """The norm of the gradient, and the loss."""
    for ranks in (plan.shards, plan.world):
        if ranks > 1:
            sent = 2 * _others(NUMBER_BYTES, ranks)
            yield Exchange("numbers", "all-reduce", ranks, sent)


def step_exchanges(config: ModelConfig, plan: Plan, sp_rank: int = 0) -> Iterator[Exchange]:
    """Every collective of a training step, as a rank makes them."""
    for use in uses(config, plan):
        yield from (gathering(config, plan, unit) for unit in use.gathers)
        if is_block(config, use.unit):
            yield from sequence(config, plan, use.backward, sp_rank)
        if use.reduces:
            yield reducing(config, plan, use.unit)
        if use.completes:
            yield adding(config, plan, use.unit)
    yield from numbers(plan)


def sync_exchanges(config: ModelConfig, plan: Plan) -> Iterator[Exchange]:
    """RL's weights to the engines, once a step: every unit is gathered."""
    if plan.shards == 1:
        return
    for unit in plan_layout(config, plan.shards).units:
        sent = _others(unit.numel * plan.compute_bytes, plan.shards)
        yield Exchange("weight sync", "all-gather", plan.shards, sent)


def is_block(config: ModelConfig, unit: int) -> bool:
    """Whether a unit is a layer; the others are the embedding and the head."""
    return 1 <= unit <= config.layers


def _others(whole: float, ranks: int) -> float:
    return whole * (ranks - 1) / ranks


def _away(sizes: Sequence[int], own: int) -> int:
    """Elements that go to others."""
    return sum(sizes) - sizes[own]
