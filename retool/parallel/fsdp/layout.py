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
from typing import NamedTuple

# Every slot and every shard starts at a multiple of so many elements: 256 bytes in bf16, more in
# fp32 and fp64. The compiler copies inputs that aren't aligned.
ALIGNMENT_NUMEL = 128


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
    """A unit's flat buffer of `numel` elements, of which each rank owns `shard_numel`."""

    name: str
    slots: tuple[Slot, ...]
    numel: int
    shard_numel: int
    start: int  # where this unit's part begins in a rank's own shard of everything

    @property
    def members(self) -> Iterator[Member]:
        return (member for slot in self.slots for member in slot.members)


@dataclass(frozen=True)
class Layout:
    """Every unit, for `shards` ranks.

    A rank's shard is `shard_numel` elements: its part of each unit, in order.
    """

    units: tuple[UnitLayout, ...]
    shards: int
    # (name on disk, name of the parameter that it is tied to)
    aliases: tuple[tuple[str, str], ...] = ()
    # Hugging Face names in `parameters()` order; empty: unit by unit
    order: tuple[str, ...] = ()
    # (name on disk, slot): one tensor that holds all members of the slot, in their order
    fused: tuple[tuple[str, str], ...] = ()

    @cached_property
    def shard_numel(self) -> int:
        return sum(unit.shard_numel for unit in self.units)

    @cached_property
    def members(self) -> tuple[tuple[UnitLayout, Member], ...]:
        """Every Hugging Face parameter once, in `parameters()` order."""
        by_name = {m.name: (unit, m) for unit in self.units for m in unit.members}
        return tuple(by_name[name] for name in self.order or by_name)


class SlotSpec(NamedTuple):
    """A tensor of a module that is to be laid out.

    `members`: the names and shapes of the Hugging Face parameters stacked in it.
    """

    name: str
    shape: tuple[int, ...]
    members: list[tuple[str, tuple[int, ...]]]
    trainable: bool = True


def make_layout(
    units: list[tuple[str, list[SlotSpec]]],
    shards: int,
    aliases: tuple[tuple[str, str], ...] = (),
    order: tuple[str, ...] = (),
    fused: tuple[tuple[str, str], ...] = (),
) -> Layout:
    """Lay out (unit name, its slots), one unit after the other, for `shards` ranks.

    `aliases`, `order` and `fused`: see `Layout`.
    """
    laid_out: list[UnitLayout] = []
    start = 0
    for name, specs in units:
        slots: list[Slot] = []
        offset = 0
        for spec in specs:
            slot = _place(SlotSpec(*spec), offset)
            slots.append(slot)
            offset += _round_up(slot.numel, ALIGNMENT_NUMEL)
        # An empty unit still has a shard: no case of its own anywhere
        numel = _round_up(max(offset, 1), shards * ALIGNMENT_NUMEL)
        unit = UnitLayout(name, tuple(slots), numel, numel // shards, start)
        laid_out.append(unit)
        start += unit.shard_numel
    return Layout(tuple(laid_out), shards, aliases, order, fused)


def _place(spec: SlotSpec, offset: int) -> Slot:
    """The slot whose first element is at `offset` in its unit, its members on top of each other."""
    members: list[Member] = []
    end = offset
    for name, shape in spec.members:
        member = Member(name, tuple(shape), end)
        members.append(member)
        end += member.numel
    slot = Slot(spec.name, tuple(spec.shape), offset, tuple(members), spec.trainable)
    assert end - offset == slot.numel, (
        f"{slot.name}: members hold {end - offset} elements, the tensor {slot.numel}"
    )
    return slot


def _round_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


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
        high = low + unit.shard_numel
        for member in unit.members:
            start = max(low, member.offset)
            stop = min(high, member.offset + member.numel)
            if start < stop:
                local = unit.start + start - low
                yield Piece(member, start - member.offset, stop - member.offset, local)
