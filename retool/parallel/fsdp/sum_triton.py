# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
"""A Triton kernel that adds up what all ranks have sent of a gradient: one pass over memory, where
torch would make one for each rank and one more for the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 8


@triton.jit
def _add_parts(
    into_ptr,
    own_ptr,
    received_ptr,
    numel,
    OWN: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    into = tl.load(into_ptr + at, inside)
    total = tl.zeros((BLOCK,), into.dtype)
    for rank in tl.static_range(RANKS):
        if rank == OWN:
            part = tl.load(own_ptr + at, inside)
        else:
            part = tl.load(received_ptr + tl.cast(numel, tl.int64) * rank + at, inside)
        total += part.to(into.dtype)
    tl.store(into_ptr + at, into + total, inside)


def add_parts(into: Tensor, sent: Tensor, received: Tensor, rank: int) -> None:
    """`retool.parallel.fsdp.overlap.add_parts` in one kernel; flat tensors, contiguous."""
    numel = into.numel()
    own = sent[rank * numel : (rank + 1) * numel]
    ranks = len(received) // numel
    _add_parts[(triton.cdiv(numel, BLOCK),)](
        into,
        own,
        received,
        numel,
        OWN=rank,
        RANKS=ranks,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
