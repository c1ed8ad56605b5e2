"""Which element of which parameter is where: one frozen table, read by FSDP, the optimizer, the
checkpoint and the merger.

A *unit* is what is gathered at once (the embedding, a decoder block, the head). Its parameters lie
in one flat buffer:

    unit:   | q_proj k_proj v_proj ·· | o_proj ··· | gate_proj up_proj · | down_proj · | ···· |
            ^ slot (used as one matrix) ^ 256-byte boundary      padding to a multiple of
                                                                 `shards` ends the buffer ^
    rank r owns elements [r·shard_numel, (r+1)·shard_numel)

A *slot* is one tensor of the module (`nn.Parameter`); its *members* are the Hugging Face parameters
that it holds, row blocks on top of each other. So `qkv.weight` is a single matrix for the compute
and three names on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

# elements: 256 bytes in bf16, more in fp32 and fp64. The compiler copies misaligned inputs.
ALIGNMENT = 128


@dataclass(frozen=True)
class Member:
    """A Hugging Face parameter: its name, shape and first element in the unit's flat buffer."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Slot:
    """One tensor of the module and the Hugging Face parameters stacked in it."""

    name: str
    shape: tuple[int, ...]
    offset: int
    members: tuple[Member, ...]
    trainable: bool = True

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class UnitLayout:
    """A unit's flat buffer.

    `start` is where this unit's part begins in a rank's own shard of everything.
    """

    name: str
    slots: tuple[Slot, ...]
    numel: int
    shard_numel: int
    start: int

    @property
    def members(self) -> Iterator[Member]:
        return (m for s in self.slots for m in s.members)


@dataclass(frozen=True)
class Layout:
    """Every unit, for `shards` ranks.

    A rank's shard is `shard_numel` elements: its part of each unit, in order.
    """

    units: tuple[UnitLayout, ...]
    shards: int
    aliases: tuple[
        tuple[str, str], ...
    ] = ()  # (name on disk, name of the parameter that it is tied to)
    order: tuple[str, ...] = ()  # Hugging Face names in `parameters()` order; empty: unit by unit

    @cached_property
    def shard_numel(self) -> int:
        return sum(u.shard_numel for u in self.units)

    @cached_property
    def members(self) -> tuple[tuple[UnitLayout, Member], ...]:
        """Every Hugging Face parameter once, in `parameters()` order."""
        found = {m.name: (u, m) for u in self.units for m in u.members}
        return tuple(found[name] for name in self.order or found)

    def reshard(self, shards: int) -> Layout:
        """The same units split over another number of ranks."""
        specs = [
            (
                u.name,
                [
                    (s.name, s.shape, [(m.name, m.shape) for m in s.members], s.trainable)
                    for s in u.slots
                ],
            )
            for u in self.units
        ]
        return make_layout(specs, shards, self.aliases, self.order)


SlotSpec = tuple[str, tuple[int, ...], list[tuple[str, tuple[int, ...]]], bool]


def make_layout(
    units: list[tuple[str, list[SlotSpec]]],
    shards: int,
    aliases: tuple[tuple[str, str], ...] = (),
    order: tuple[str, ...] = (),
) -> Layout:
    """Lay out units given as (unit name, [(slot name, slot shape, [(HF name, HF shape), …],
    trainable), …]).
    """
    out = []
    start = 0
    for name, specs in units:
        slots = []
        offset = 0
        for slot_name, shape, members, trainable in specs:
            inside = offset
            placed = []
            for member_name, member_shape in members:
                placed.append(Member(member_name, tuple(member_shape), inside))
                inside += prod(member_shape)
            assert inside - offset == prod(shape), (
                f"{slot_name}: members hold {inside - offset} elements, the tensor {prod(shape)}"
            )
            slots.append(Slot(slot_name, tuple(shape), offset, tuple(placed), trainable))
            offset += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
        shard = -(-max(offset, 1) // (shards * ALIGNMENT)) * ALIGNMENT
        out.append(UnitLayout(name, tuple(slots), shard * shards, shard, start))
        start += shard
    return Layout(tuple(out), shards, aliases, order)


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of `member` (flattened) stand at `local` in a rank's own shard."""

    member: Member
    start: int
    stop: int
    local: int


def local_pieces(layout: Layout, shard_rank: int) -> Iterator[Piece]:
    """What rank `shard_rank` of `layout.shards` owns, in memory order; padding is in no piece."""
    for unit in layout.units:
        low = shard_rank * unit.shard_numel
        high = (shard_rank + 1) * unit.shard_numel
        for member in unit.members:
            start = max(low, member.offset)
            stop = min(high, member.offset + member.numel)
            if start < stop:
                yield Piece(
                    member, start - member.offset, stop - member.offset, unit.start + start - low
                )
