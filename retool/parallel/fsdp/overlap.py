"""Communication beside computation: FSDP's timeline.

Three streams, and with replicas (HSDP) a fourth. Time runs to the right; W₁ is the gather of unit 1's
weights, R₁ the reduction of its gradients, A₁ their sum over the replicas. While unit 1 computes, unit
2's weights arrive and unit 3's gradients leave:

    forward     compute  | unit 0 | unit 1 | unit 2 | unit 3 |
                gather   |  W₁    |  W₂    |  W₃    |

    backward    compute  | unit 3 | unit 2 | unit 1 | unit 0 | the embedding's R₀, the clip, AdamW
                gather   |  (W₂)  |  W₁    |  W₀    |          (W₂: still there from the forward)
                reduce            |  R₃    |  R₂    |  R₁    | R₀
                replicas                   |  A₃    |  A₂    |  A₁    | A₀     (in a step's last backward)

Units take turns in few buffers (`fsdp/buffers.py`), so three orders must hold:
  * a gather into a buffer starts after the last use by the unit that held it: `Buffer.free`, an
    event on the compute stream. Where the end of that use wasn't seen, `Buffer.in_use` says so, and
    the gather starts after all that is enqueued;
  * a unit computes after its gather has ended: `Pending.wait`;
  * a gradient buffer is written again after the reduction that reads it: `Pending.wait`.

The host never waits for CUDA. On the CPU gloo's own threads do the transfer, and `Pending.wait`
blocks. `tests/parallel/test_streams.py` checks each of the orders without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from retool.parallel.collectives import (
    all_gather_flat,
    reduce_scatter_flat,
    send_parts,
    sum_over,
)
from retool.parallel.streams import OnStream, current_stream, record_event, wait_for


@dataclass
class Pending:
    """A collective under way. `wait` orders what the caller does next after it."""

    event: torch.cuda.Event | None = None
    # On the CPU instead of the event: gloo's handles, and what is left to do with what they brought
    works: list[Any] = field(default_factory=list)
    then: list[Callable[[], None]] = field(default_factory=list)

    def wait(self) -> None:
        wait_for(self.event)
        for work in self.works:
            work.wait()
        actions = self.then
        self.works = []
        self.then = []
        for action in actions:
            action()

    def follow_with(self, action: Callable[[], None]) -> None:
        """Start what comes after the collective: now where a stream orders it, else once it was waited
        for.
        """
        if self.works:
            self.then.append(action)
        else:
            action()


class Overlap:
    """The streams beside the computation of one sharded module (None on the CPU)."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        # Weights arrive on one while the compute stream uses the unit before …
        self.gather_stream = torch.cuda.Stream(device) if on_gpu else None
        # … and gradients leave on the other, which a gather need not wait for
        self.reduce_stream = torch.cuda.Stream(device) if on_gpu else None
        # Replicas are on other machines: the next reduction inside this one doesn't wait for them
        self.replica_stream = torch.cuda.Stream(device) if on_gpu else None

    def gather(
        self,
        out: torch.Tensor,
        shard: torch.Tensor,
        group: dist.ProcessGroup,
        free: torch.cuda.Event | None,
    ) -> Pending:
        """Start gathering `shard` of every rank into `out`, once `free` has happened.

        A shard of another dtype is cast into its own place in `out`, and sent from there.
        """
        with OnStream(self.gather_stream):
            wait_for(free)
            if shard.dtype != out.dtype:
                parts = out.view(dist.get_world_size(group), -1)
                shard = parts[dist.get_rank(group)].copy_(shard)
            if self.gather_stream is None:
                return Pending(works=[all_gather_flat(out, shard, group=group, async_op=True)])
            all_gather_flat(out, shard, group=group)
            return Pending(event=record_event(self.gather_stream))

    def reduce(self, flat: torch.Tensor, into: torch.Tensor, group: dist.ProcessGroup) -> Pending:
        """Start summing `flat` over the ranks; this rank's part of the sum is added to `into`."""
        if self.reduce_stream is None:
            part = flat.new_empty(into.shape)
            work = reduce_scatter_flat(part, flat, group=group, async_op=True)
            return Pending(works=[work], then=[lambda: _add(into, part)])
        # The gradients were written on the compute stream
        self.reduce_stream.wait_stream(current_stream())
        with OnStream(self.reduce_stream):
            # Made, used and freed on this stream: no other can take its memory too early
            part = flat.new_empty(into.shape)
            reduce_scatter_flat(part, flat, group=group)
            into.add_(part)
            return Pending(event=record_event(self.reduce_stream))

    def reduce_parts(
        self,
        flat: torch.Tensor,
        received: torch.Tensor,
        into: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> Pending:
        """`reduce` of a `flat` in a narrower dtype than `into`, which is what they are added up in.

        Half the bytes travel, into `received`, which is as large as `flat`. Inside a machine alone:
        a ring would leave it once for all of its ranks, and these parts leave it once for each.
        """
        rank = dist.get_rank(group)
        if self.reduce_stream is None:
            works = send_parts(received, flat, group)
            return Pending(works=works, then=[lambda: add_parts(into, flat, received, rank)])
        self.reduce_stream.wait_stream(current_stream())
        with OnStream(self.reduce_stream):
            for work in send_parts(received, flat, group):
                work.wait()
            add_parts(into, flat, received, rank)
            return Pending(event=record_event(self.reduce_stream))

    def add_up(self, shard: torch.Tensor, group: dist.ProcessGroup) -> Pending:
        """Start summing a shard of the gradient over the replicas, in place, after what was started
        into it.
        """
        if self.replica_stream is None or self.reduce_stream is None:
            return Pending(works=[dist.all_reduce(shard, group=group, async_op=True)])
        self.replica_stream.wait_stream(self.reduce_stream)
        # What a rank owns alone is added to the shard on the compute stream
        self.replica_stream.wait_stream(current_stream())
        with OnStream(self.replica_stream):
            sum_over(shard, group)
            return Pending(event=record_event(self.replica_stream))

    def follow_new_weights(self) -> None:
        """The shards were just written on the compute stream: gathers start after that."""
        if self.gather_stream is not None:
            self.gather_stream.wait_stream(current_stream())


def add_parts(into: torch.Tensor, sent: torch.Tensor, received: torch.Tensor, rank: int) -> None:
    """Add up this rank's part of what all ranks have sent, in rank order, and add that to `into`.

    Its own is in `sent`, see `send_parts`. With two ranks the bits are those of a reduce-scatter in
    `into`'s dtype.
    """
    if into.is_cuda:
        from retool.parallel.fsdp import sum_triton

        sum_triton.add_parts(into, sent, received, rank)
        return
    ranks = len(received) // len(into)
    parts = list(received.chunk(ranks))
    parts[rank] = sent.chunk(ranks)[rank]
    total = parts[0].to(into.dtype)
    for part in parts[1:]:
        total.add_(part)
    into.add_(total)


def _add(into: torch.Tensor, part: torch.Tensor) -> None:
    into.add_(part)
