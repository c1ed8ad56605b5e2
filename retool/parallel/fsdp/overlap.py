"""Where communication runs beside computation.

    compute   | unit 0 | unit 1 | unit 2 |            … unit 2 back | unit 1 back | …
    gather    |  g1    |  g2    |                       g1          |  g0         |
    reduce                                                          |  r2         | r1

One stream gathers, one reduces. On the CPU gloo's own threads do the transfer and `Pending.wait`
blocks.

[Note: buffers and events] Units take turns in a few buffers made once (`assign_buffers`), so that
no allocation is ever freed across streams. Three orders must hold, each by an event:
  * a gather into a buffer starts after the compute stream's last use by the unit that held it
    (`Buffer.free`; where the end of that use wasn't seen, `Buffer.in_use`, after all that is
    enqueued);
  * compute starts after the gather has ended (`Pending.wait`);
  * a gradient buffer is written again only after its reduction has read it (`Pending.wait`).

The host never waits on CUDA. `tests/parallel/test_streams.py` checks them without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist

# Renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass
class Pending:
    """A collective under way. `wait` orders what the caller does next after it."""

    event: torch.cuda.Event | None = None
    work: Any = None
    then: Callable[[], None] | None = None

    def wait(self) -> None:
        wait_for(self.event)
        if self.work is not None:
            self.work.wait()
            self.work = None
            if self.then is not None:
                self.then()
                self.then = None


@dataclass
class Buffer:
    """Memory that units use in turn; `holder` is the index of the unit whose parameters it has, or
    is getting.

    `in_use`: where the holder is, until it is released; `free`: the end of its last use.
    """

    data: torch.Tensor
    holder: int | None = None
    pending: Pending | None = None
    free: torch.cuda.Event | None = None
    in_use: Literal["forward", "backward"] | None = None


class Overlap:
    """The gather and the reduce stream of one sharded module (None on the CPU)."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.gather_stream = torch.cuda.Stream(device) if cuda else None
        self.reduce_stream = torch.cuda.Stream(device) if cuda else None

    def gather(
        self,
        out: torch.Tensor,
        shard: torch.Tensor,
        group: dist.ProcessGroup,
        free: torch.cuda.Event | None,
    ) -> Pending:
        """Start gathering `shard` of every rank into `out`, once `free` has happened; one of
        another dtype is cast into its place there.
        """
        with torch.cuda.stream(self.gather_stream):
            wait_for(free)
            if shard.dtype != out.dtype:
                shard = out.view(dist.get_world_size(group), -1)[dist.get_rank(group)].copy_(shard)
            if self.gather_stream is None:
                return Pending(work=_all_gather(out, shard, group=group, async_op=True))
            _all_gather(out, shard, group=group)
            return Pending(event=recorded())

    def reduce(self, flat: torch.Tensor, into: torch.Tensor, group: dist.ProcessGroup) -> Pending:
        """Start summing `flat` over the ranks; this rank's part is added to `into`."""
        if self.reduce_stream is None:
            part = flat.new_empty(into.shape)
            work = _reduce_scatter(part, flat, group=group, async_op=True)
            return Pending(work=work, then=lambda: _add(into, part))
        self.reduce_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.reduce_stream):
            part = flat.new_empty(into.shape)
            _reduce_scatter(part, flat, group=group)
            into.add_(part)
            return Pending(event=recorded())

    def refreshed(self) -> None:
        """The shards were just written on the compute stream: later gathers start after that."""
        if self.gather_stream is not None:
            self.gather_stream.wait_stream(torch.cuda.current_stream())


def recorded() -> torch.cuda.Event:
    """An event after everything that is on the current stream now."""
    event = torch.cuda.Event()
    event.record()
    return event


def wait_for(event: torch.cuda.Event | None) -> None:
    """What the current stream does next comes after the event."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def copied(
    stream: torch.cuda.Stream | None,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    after: torch.cuda.Event | None,
) -> torch.cuda.Event | None:
    """Copy each (target, source) on `stream` once `after` has happened; the event of their end.

    Without a stream at once.
    """
    with torch.cuda.stream(stream):
        wait_for(after)
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        return None if stream is None else recorded()


def _add(into: torch.Tensor, part: torch.Tensor) -> None:
    into.add_(part)


def rooms(sizes: Sequence[int], buffers: Sequence[int]) -> list[int]:
    """Elements of each buffer: the largest of the units that take turns in it."""
    return [
        max(n for n, b in zip(sizes, buffers, strict=True) if b == k)
        for k in range(max(buffers) + 1)
    ]


def assign_buffers(sizes: Sequence[int], own: Sequence[bool]) -> list[int]:
    """A buffer number for each unit, in forward order; neighbours never share one.

    Units of like size (within a factor of two) alternate between two buffers, or use a single one
    if no two of them are neighbours; a unit with `own` has its own. So a decoder keeps two blocks
    and the embedding or the head.
    """
    groups: list[list[int]] = []
    for i, size in enumerate(sizes):
        fit = next(
            (
                g
                for g in groups
                if not own[i] and not own[g[0]] and 0.5 <= size / max(sizes[g[0]], 1) <= 2
            ),
            None,
        )
        if fit is None:
            groups.append([i])
        else:
            fit.append(i)
    out = [0] * len(sizes)
    count = 0
    for members in groups:
        several = 2 if any(b - a == 1 for a, b in pairwise(members)) else 1
        for position, unit in enumerate(members):
            out[unit] = count + position % several
        count += several
    return out
