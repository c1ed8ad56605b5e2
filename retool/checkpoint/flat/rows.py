"""From flat shards in memory to rows on disk: who sends which elements to whom, and the exchange
itself.

In memory, rank r of S owns elements [r·n, (r+1)·n) of a unit's flat buffer, wherever parameters
begin and end. On disk every parameter is split into rows the way `torch.chunk` does: ceil(rows/S)
each, the last ranks fewer or none. A rank's row buffer of a unit holds its rows of each parameter,
one after the other, without padding.
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
    rows: list[Rows] = []
    for unit in layout.units:
        rows += unit_rows(
            unit,
            layout.shards,
            rank,
            rows[-1].offset + rows[-1].stop - rows[-1].start if rows else 0,
        )
    return rows


def named_rows(layout: Layout, rank: int) -> list[Rows]:
    """The same in `parameters()` order, which is the order in files."""
    found = {rows.member.name: rows for rows in all_rows(layout, rank)}
    return [found[member.name] for _, member in layout.members]


def rows_numel(layout: Layout, rank: int) -> int:
    """Elements in rank `rank`'s row buffer of everything."""
    return sum(unit_numel(unit, layout.shards, rank) for unit in layout.units)


def unit_numel(unit: UnitLayout, shards: int, rank: int) -> int:
    """Elements in rank `rank`'s row buffer of a unit."""
    return sum(rows.stop - rows.start for rows in unit_rows(unit, shards, rank))


def _segments(unit: UnitLayout, shards: int, owner: int, to: int) -> Iterator[tuple[int, int, int]]:
    """What `owner` holds of rank `to`'s rows: (start, stop) in owner's flat shard of the unit, and
    where it goes in the row buffer.
    """
    low = owner * unit.shard_numel
    for rows in unit_rows(unit, shards, to):
        begin = rows.member.offset + rows.start
        start = max(low, begin)
        stop = min(low + unit.shard_numel, rows.member.offset + rows.stop)
        if start < stop:
            yield start - low, stop - low, rows.offset + start - begin


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
    incoming = [list(_segments(unit, shards, owner, rank)) for owner in range(shards)]
    outgoing = [list(_segments(unit, shards, rank, to)) for to in range(shards)]
    if out is None:
        out = flat.new_empty(sum(_numel(segments) for segments in incoming))
    for a, b, offset in incoming[rank]:  # what stays here is copied once
        out[offset : offset + b - a] = flat[a:b]
    if group is None:
        return out
    incoming[rank] = outgoing[rank] = []
    sent = torch.cat([flat[a:b] for segments in outgoing for a, b, _ in segments] or [flat[:0]])
    received = flat.new_empty(sum(map(_numel, incoming)))
    at = 0
    dist.all_to_all_single(
        received, sent, [_numel(s) for s in incoming], [_numel(s) for s in outgoing], group=group
    )
    for segments in incoming:
        for a, b, offset in segments:
            out[offset : offset + b - a] = received[at : at + b - a]
            at += b - a
    return out


def _numel(segments: list[tuple[int, int, int]]) -> int:
    return sum(b - a for a, b, _ in segments)
