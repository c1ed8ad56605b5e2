"""What every attention kernel is given and gives.

Shapes: T tokens · N query heads · K key/value heads · H head dim · B documents
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from retool.batch import PackedBatch, edges


class Pack(NamedTuple):
    """Which documents there are, and what a query sees of its own.

    `cu_seqlens` int32 [B+1] on the device, `seqlens` the same lengths on the host, which add up to T,
    and `max_seqlen` their largest. `window`: how many tokens a query sees, itself the last of them; 0
    means all before it. `cap`: scaled scores s become cap · tanh(s / cap) (Gemma 2, arXiv
    2408.00118); 0 leaves them.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    seqlens: tuple[int, ...]
    window: int = 0
    cap: float = 0.0


def pack_of(batch: PackedBatch, window: int = 0, cap: float = 0.0) -> Pack:
    """A batch's documents.

    A window that reaches across the longest of them is none: any kernel may run then.
    """
    if window >= batch.max_seqlen:
        window = 0
    return Pack(batch.cu_seqlens, batch.max_seqlen, batch.seqlens, window, cap)


def new_pack(
    seqlens: tuple[int, ...], device: torch.device, window: int = 0, cap: float = 0.0
) -> Pack:
    """Documents of these lengths."""
    return Pack(edges(seqlens).to(device), max(seqlens), seqlens, window, cap)


Gradients = tuple[Tensor, Tensor, Tensor]
# A kernel's result [T, N, H], and the natural log-sum-exp of each query's scaled scores [N, T]
Attended = tuple[Tensor, Tensor]
# (q [T, N, H], k and v [T, K, H], pack) → out and lse
Forward = Callable[[Tensor, Tensor, Tensor, Pack], Attended]
# (dout, q, k, v, out, lse, pack) → dq, dk, dv
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Pack], Gradients]
