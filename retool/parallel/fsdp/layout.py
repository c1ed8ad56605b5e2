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

[Note: divided units] With expert parallelism a rank never needs all experts of a layer, but one part
of `parts`. They are a unit of their own, in which each part has its slots and its padding, and a part
is gathered by the ranks that own it. Neighbouring ranks own different parts (rank r one of part
r mod parts): tokens travel between neighbours, and weights between the others.

    unit:   | part 0: gate_up down ·· | part 1: gate_up down ·· |      parts 2, shards 4
    owner   |   rank 0  |   rank 2    |   rank 1  |   rank 3    |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    part: int = 0  # of its unit

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
    parts: int = 1  # see [Note: divided units]
    place: int = 0  # what is gathered and released together has the same

    @property
    def members(self) -> Iterator[Member]:
        return (member for slot in self.slots for member in slot.members)

    @property
    def part_numel(self) -> int:
        """Elements of a part: what a rank gathers."""
        return self.numel // self.parts

    @property
    def owners(self) -> int:
        """Ranks that own a part together."""
        return self.part_numel // self.shard_numel

    def low(self, shard_rank: int) -> int:
        """The first of the `shard_numel` elements that a rank owns."""
        turn, part = divmod(shard_rank, self.parts)
        return part * self.part_numel + turn * self.shard_numel

    def slots_of(self, shard_rank: int) -> tuple[Slot, ...]:
        """The slots of a rank's part; their offsets count from the part's beginning."""
        part = shard_rank % self.parts
        return tuple(
            replace(slot, offset=slot.offset - part * self.part_numel)
            for slot in self.slots
            if slot.part == part
        )


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

    `members`: the names and shapes of the Hugging Face parameters stacked in it. Of a `divided` one
    each part of its unit has as many: `shape` is a part's.
    """

    name: str
    shape: tuple[int, ...]
    members: list[tuple[str, tuple[int, ...]]]
    trainable: bool = True
    divided: bool = False


def make_layout(
    units: list[tuple[str, list[SlotSpec]]],
    shards: int,
    aliases: tuple[tuple[str, str], ...] = (),
    order: tuple[str, ...] = (),
    fused: tuple[tuple[str, str], ...] = (),
    parts: int = 1,
) -> Layout:
    """Lay out (unit name, its slots), one unit after the other, for `shards` ranks.

    With several `parts`, a unit's divided slots are a unit behind it. `aliases`, `order` and `fused`:
    see `Layout`.
    """
    laid_out: list[UnitLayout] = []
    start = 0
    for place, (name, given) in enumerate(units):
        specs = [SlotSpec(*spec) for spec in given]
        divided = [spec for spec in specs if spec.divided and parts > 1]
        common = [spec for spec in specs if spec not in divided]
        # An empty unit still has a shard: no case of its own anywhere
        found = [_lay_out(name, common, 1, shards)]
        if divided:
            found.append(_lay_out(f"{name}, divided", divided, parts, shards))
        for unit in found:
            laid_out.append(replace(unit, start=start, place=place))
            start += unit.shard_numel
    return Layout(tuple(laid_out), shards, aliases, order, fused)


def _lay_out(name: str, specs: list[SlotSpec], parts: int, shards: int) -> UnitLayout:
    """A unit that begins at 0."""
    slots: list[Slot] = []
    part_numel = 0
    for part in range(parts):
        offset = first = part * part_numel
        for spec in specs:
            count = len(spec.members) // parts
            members = spec.members[part * count : (part + 1) * count]
            slot = _place(spec._replace(members=members), offset)
            slots.append(replace(slot, part=part))
            offset += _round_up(slot.numel, ALIGNMENT_NUMEL)
        # So that every owner's shard of it begins on an aligned element, too.
        part_numel = _round_up(max(offset - first, 1), shards // parts * ALIGNMENT_NUMEL)
    numel = parts * part_numel
    return UnitLayout(name, tuple(slots), numel, numel // shards, start=0, parts=parts)


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
        low = unit.low(shard_rank)
        high = low + unit.shard_numel
        for member in unit.members:
            start = max(low, member.offset)
            stop = min(high, member.offset + member.numel)
            if start < stop:
                local = unit.start + start - low
                yield Piece(member, start - member.offset, stop - member.offset, local)
