"""From flat shards in memory to rows on disk: who sends which elements to whom, and the exchange
itself.

In memory, each of S ranks owns n elements of a unit's flat buffer (`UnitLayout.low`), wherever
parameters begin and end. On disk every parameter is split into rows the way `torch.chunk` does:
ceil(rows/S) each, the last ranks fewer or none. A rank's row buffer of a unit holds its rows of each
parameter, one after the other, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from retool.parallel.fsdp.layout import Layout, Member, UnitLayout


def row_range(rows: int, shards: int, rank: int) -> tuple[int, int]:
    """The rows of shard `rank`, as torch.chunk splits them."""
    # Rounded up, as torch.chunk does: the last ranks have fewer rows, or none.
    chunk = -(-rows // shards)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


@dataclass(frozen=True)
class Rows:
    """A rank's rows of a parameter: elements [start, stop) of it, at `offset` in the rank's row
    buffer of all units.
    """

    member: Member
    start: int
    stop: int
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        width = prod(self.member.shape[1:])
        return (self.stop - self.start) // max(width, 1), *self.member.shape[1:]


def unit_rows(unit: UnitLayout, shards: int, rank: int, offset: int = 0) -> Iterator[Rows]:
    """Rank `rank`'s rows of each parameter of a unit (empty ones too), in order."""
    for member in unit.members:
        width = prod(member.shape[1:])
        first, last = row_range(member.shape[0], shards, rank)
        yield Rows(member, first * width, last * width, offset)
        offset += (last - first) * width


def all_rows(layout: Layout, rank: int) -> list[Rows]:
    """Rank `rank`'s rows of everything, in the order of the row buffer."""
    all_units: list[Rows] = []
    offset = 0
    for unit in layout.units:
        rows = list(unit_rows(unit, layout.shards, rank, offset))
        offset += sum(each.stop - each.start for each in rows)
        all_units += rows
    return all_units


def named_rows(layout: Layout, rank: int) -> list[Rows]:
    """The same in `parameters()` order, which is the order in files."""
    by_name = {rows.member.name: rows for rows in all_rows(layout, rank)}
    return [by_name[member.name] for _, member in layout.members]


def rows_numel(layout: Layout, rank: int) -> int:
    """Elements in rank `rank`'s row buffer of everything."""
    return sum(unit_numel(unit, layout.shards, rank) for unit in layout.units)


def unit_numel(unit: UnitLayout, shards: int, rank: int) -> int:
    """Elements in rank `rank`'s row buffer of a unit."""
    return sum(rows.stop - rows.start for rows in unit_rows(unit, shards, rank))


@dataclass(frozen=True)
class _Segment:
    """Elements that one rank has and another one needs.

    [start, stop) in the owner's flat shard of a unit; they go to `offset` in the row buffer.
    """

    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def taken_from(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.stop]

    def put_into(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        rows[self.offset : self.offset + self.numel] = values


def _segments(unit: UnitLayout, shards: int, owner: int, to: int) -> list[_Segment]:
    """The parts of rank `to`'s rows that `owner` holds."""
    low = unit.low(owner)
    high = low + unit.shard_numel
    segments: list[_Segment] = []
    for rows in unit_rows(unit, shards, to):
        first = rows.member.offset + rows.start
        start = max(low, first)
        stop = min(high, rows.member.offset + rows.stop)
        if start < stop:
            segments.append(_Segment(start - low, stop - low, rows.offset + start - first))
    return segments


def _numel(segments: list[_Segment]) -> int:
    return sum(segment.numel for segment in segments)


def to_rows(
    unit: UnitLayout,
    shards: int,
    rank: int,
    flat: torch.Tensor,
    group: dist.ProcessGroup | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """This rank's row buffer of a unit (`out`, or a new one), from every rank's flat shard
    [unit.shard_numel] of it. A collective call of `group`.
    """
    # Both sides compute the same lists from the layout, so sizes need no exchange of their own.
    incoming = [_segments(unit, shards, owner, rank) for owner in range(shards)]
    outgoing = [_segments(unit, shards, rank, to) for to in range(shards)]
    if out is None:
        out = flat.new_empty(sum(map(_numel, incoming)))
    # What stays here is copied once, and isn't sent.
    for segment in incoming[rank]:
        segment.put_into(out, segment.taken_from(flat))
    if group is None:
        return out
    incoming[rank] = []
    outgoing[rank] = []
    pieces = [segment.taken_from(flat) for segments in outgoing for segment in segments]
    sent = torch.cat(pieces) if pieces else flat[:0]
    received = flat.new_empty(sum(map(_numel, incoming)))
    dist.all_to_all_single(
        received,
        sent,
        [_numel(segments) for segments in incoming],
        [_numel(segments) for segments in outgoing],
        group=group,
    )
    at = 0
    for segments in incoming:
        for segment in segments:
            segment.put_into(out, received[at : at + segment.numel])
            at += segment.numel
    return out
