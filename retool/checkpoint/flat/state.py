"""What a rank owns of the model and its optimizer: whether it is finite, and what other replicas
have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from retool.parallel.collectives import gather_objects
from retool.parallel.fsdp.layout import Layout, local_pieces
from retool.parallel.mesh import Mesh


@dataclass(frozen=True)
class ModelState:
    """What a rank owns of the model and its optimizer: flat shards [layout.shard_numel] in the
    master's dtype, in `layout`'s order.

    The moments are None where there is no optimizer. `updates` counts the optimizer's so far;
    `hyperparameters` are AdamW's (lr, betas, …), for readers that load them.
    """

    layout: Layout
    params: torch.Tensor
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
    updates: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tensor in (self.params, self.exp_avg, self.exp_avg_sq):
            assert tensor is None or tensor.shape == (self.layout.shard_numel,), (
                "a flat shard has another size than the layout says"
            )


def require_finite(layout: Layout, mesh: Mesh, flat: torch.Tensor, what: str, way_out: str) -> None:
    """ValueError on every rank if any rank's shard of the parameters has a NaN or an infinity.

    A collective call of all ranks. The message begins with `what`, names the parameters and ends
    with `way_out`. Reads `flat` [layout.shard_numel] once; the host waits for the device once.
    """
    pieces = list(local_pieces(layout, mesh.shard_rank))
    # Smallest and largest are NaN if any element is, and infinite if one is: nothing as large as
    # the shard is allocated.
    extremes: list[torch.Tensor] = []
    for piece in pieces:
        values = flat[piece.local : piece.local + piece.stop - piece.start]
        extremes.append(torch.stack(torch.aminmax(values)))
    finite = torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
    mine = [piece.member.name for piece, good in zip(pieces, finite, strict=True) if not good]
    bad = {name for names in gather_objects(mine, mesh.world_group) for name in names}
    if not bad:
        return
    raise ValueError(f"{what}: NaN or infinite values in {_listed(layout, bad)}. {way_out}")


def _listed(layout: Layout, names: Collection[str]) -> str:
    """The first of these parameters, in the model's order."""
    named = [member.name for _, member in layout.members if member.name in names]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return f"{', '.join(named[:5])}{more}"


ADDED_AT_ONCE = 1 << 22  # elements


def sum_of(bits: torch.Tensor) -> torch.Tensor:
    """The sum of integers. In parts: torch makes int64 of all that it adds up at once, which of a
    large embedding would be twice its memory.
    """
    parts = [part.sum(dtype=torch.int64) for part in bits.split(ADDED_AT_ONCE)]
    return torch.stack(parts).sum()


# By the width of a float: integers of the same bits
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_same_replicas(layout: Layout, mesh: Mesh, flat: torch.Tensor, source: str) -> None:
    """ValueError on every rank if two replicas hold other values of the same shard.

    A collective call of all ranks. Each has read its shard by itself from what it knows as `source`,
    and machines with copies of their own may have two versions. Replicas that begin apart stay
    apart, as they add up the same gradients. Compared are sums of bits, parameter by parameter: any
    change of one element changes one. Reads `flat` [layout.shard_numel] once.
    """
    if mesh.replicas == 1:
        return
    bits = flat.detach().view(BITS[flat.element_size()])
    sums = [
        sum_of(bits[piece.local : piece.local + piece.stop - piece.start])
        for piece in local_pieces(layout, mesh.shard_rank)
    ]
    mine = torch.stack(sums).tolist() if sums else []
    first: dict[int, tuple[int, list[int]]] = {}
    for rank, theirs in enumerate(gather_objects(mine, mesh.world_group)):
        shard = rank % mesh.shards
        one, expected = first.setdefault(shard, (rank, theirs))
        if theirs == expected:
            continue
        names = {
            piece.member.name
            for piece, a, b in zip(local_pieces(layout, shard), theirs, expected, strict=True)
            if a != b
        }
        raise ValueError(
            f"{source} isn't the same on all machines: ranks {one} and {rank} read other values of "
            f"{_listed(layout, names)}. Copy it again, or use a disk that all machines share."
        )
