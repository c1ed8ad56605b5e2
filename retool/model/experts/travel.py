"""Expert parallelism: tokens travel to the ranks that have their experts, and their results back.

    x [t, D] → rows [t·k, D], sorted by expert, and so by rank
      all_to_all              each row to the rank that has its expert: n rows arrive
      sorted by expert        they arrive rank after rank
      weighted MLPs           of this rank's experts
      all_to_all              each result to where its token is
    → [t, D]

How many rows travel is uneven, none is dropped, and a rank that gets none takes part all the same.
The backward is the same way in reverse. Every rank of the group must run as many of these exchanges
in the same order, so a block that recomputes runs its tokens in one piece here, however many they are.

Legend: t tokens of this rank · k experts of a token · D model · X experts · n rows that this rank
computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from retool.model.experts.products import Sorted, collect, sort_by_expert, spread, weighted_mlps
from retool.parallel.collectives import all_to_all, exchange


class Trip(NamedTuple):
    """How many rows go to each rank and come from each, and how the latter sort by expert."""

    sent: list[int]
    received: list[int]
    here: Sorted

    def to_experts(self, flat: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
        """Rows of `width` elements on the way out; differentiable."""
        sent = [rows * width for rows in self.sent]
        received = [rows * width for rows in self.received]
        return all_to_all(flat, sent, received, group)

    def back(self, flat: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
        """The same on the way home."""
        sent = [rows * width for rows in self.received]
        received = [rows * width for rows in self.sent]
        return all_to_all(flat, sent, received, group)


def plan_trip(
    where: Sorted,
    own: int,
    group: dist.ProcessGroup,
) -> Trip:
    """Tell the ranks of the group how many rows come for each of the `own` experts that each has.

    Collective. The host waits for the device: sizes of an exchange are numbers of the host's.
    """
    ranks = len(where.ends) // own
    even = [own] * ranks
    ends = where.ends.long()
    leaving = ends.diff(prepend=ends.new_zeros(1))
    coming = exchange(leaving, even, even, group)
    # Together, so that the host waits for the device once.
    both = torch.stack([leaving, coming]).view(2, ranks, own)
    sent, received = both.sum(-1).tolist()
    numbers = torch.arange(own, device=coming.device).repeat(ranks)
    experts = numbers.repeat_interleave(coming, output_size=sum(received))
    return Trip(sent, received, sort_by_expert(experts[:, None], own))


def travelling_mlp(
    x_tD: Tensor,
    experts_tk: Tensor,
    weights_tk: Tensor,
    gate_up: Tensor,
    down: Tensor,
    group: dist.ProcessGroup,
) -> Tensor:
    """`products.experts_mlp` where the ranks of `group` divide the experts: [t, D] → [t, D].

    `gate_up` and `down` are of this rank's experts, `experts_tk` counts those of all. Collective.
    """
    own = len(gate_up)
    width = x_tD.shape[1]
    where = sort_by_expert(experts_tk, own * dist.get_world_size(group))
    trip = plan_trip(where, own, group)
    leaving = weights_tk.flatten().index_select(0, where.order)
    weights = trip.to_experts(leaving, 1, group).index_select(0, trip.here.order)
    arrived = trip.to_experts(spread(x_tD, where).flatten(), width, group)
    rows = spread(arrived.view(-1, width), trip.here)
    out = weighted_mlps(rows, weights, trip.here.ends, gate_up, down)
    home = trip.back(collect(out, trip.here).flatten(), width, group)
    return collect(home.view(-1, width), where)
