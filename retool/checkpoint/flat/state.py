"""What a rank owns of the model and its optimizer, and whether all of it is finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from retool.parallel.collectives import gather_objects
from retool.parallel.fsdp.layout import Layout, local_pieces


@dataclass(frozen=True)
class ModelState:
    """What a rank owns of the model and its optimizer: flat shards [layout.shard_numel] in the
    master's dtype, in `layout`'s order.

    The moments are None where there is no optimizer. `step` counts optimizer updates.
    """

    layout: Layout
    params: torch.Tensor
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
    step: int = 0

    def __post_init__(self) -> None:
        for tensor in (self.params, self.exp_avg, self.exp_avg_sq):
            assert tensor is None or tensor.shape == (self.layout.shard_numel,), (
                "a flat shard has another size than the layout says"
            )


def require_finite(
    layout: Layout,
    shard_rank: int,
    flat: torch.Tensor,
    group: dist.ProcessGroup | None,
    what: str,
    way_out: str,
) -> None:
    """ValueError, on every rank of `group`, where any rank's shard of the parameters has a NaN or
    an infinity. A collective call.

    The message begins with `what`, names the parameters and ends with `way_out`. Reads `flat`
    [layout.shard_numel] once; the host waits for the device once.
    """
    pieces = [*local_pieces(layout, shard_rank)]
    # Smallest and largest are NaN if any element is, and infinite if one is: nothing as large as
    # the shard is allocated.
    extremes = [
        torch.stack(torch.aminmax(flat[p.local : p.local + p.stop - p.start])) for p in pieces
    ]
    finite = torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
    mine = [piece.member.name for piece, good in zip(pieces, finite, strict=True) if not good]
    found = {name for names in gather_objects(mine, group) for name in names}
    if not found:
        return
    named = [member.name for _, member in layout.members if member.name in found]
    listed = ", ".join(named[:5])
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    raise ValueError(f"{what}: NaN or infinite values in {listed}{more}. {way_out}")
