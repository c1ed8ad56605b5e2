"""Ulysses sequence parallelism (Jacobs et al., arXiv 2309.14509): tokens are split outside
attention, heads inside it.

    [t, N+2K, H] of this rank's tokens, all heads
        split_heads   one buffer: for each rank its query heads, then the kv heads that those need   (local)
        all_to_all    one collective for q, k and v
        q_k_v         [T, n, H], [T, k, H], [T, k, H]: all tokens, this rank's heads                 (local)
        attention
        all_to_all    rows of the output go back to the ranks that own those tokens                 (already in order)
        join_heads    [t, N, H]                                                                       (local)

Any sp from 1 to N. Query heads are split as evenly as they go; a kv head travels to each rank with
a query head that reads it, and no further. Copies of a kv head come from one slice each, taken
before the cast to the compute dtype, so that autograd adds their gradients in fp32.

Legend: T tokens of the pack · t tokens of this rank · N / K query / kv heads · n / k this rank's ·
H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise, starmap

import torch


@dataclass(frozen=True)
class HeadPlan:
    """Which heads each of `sp` ranks computes, for N query and K kv heads (K divides N).

    `query_ranges`: query heads of each rank, the first N mod sp ranks have one more. `kv_ranges`:
    kv heads that those read. `widths`: heads (query + key + value) that each rank receives.
    `expansion`: this rank's local kv head of each local query head, or None where they group
    uniformly as kernels want it. All plain fields: the compiler reads them.
    """

    sp: int
    rank: int
    heads: int
    kv_heads: int
    head_dim: int
    query_ranges: tuple[range, ...] = field(init=False, repr=False)
    kv_ranges: tuple[range, ...] = field(init=False, repr=False)
    widths: tuple[int, ...] = field(init=False, repr=False)
    expansion: tuple[int, ...] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.sp <= self.heads:
            raise ValueError(
                f"ulysses_sequence_parallel_size={self.sp} exceeds the model's {self.heads} query "
                f"heads: each rank needs one. Use 1 to {self.heads}."
            )
        base, more = divmod(self.heads, self.sp)
        edges = [r * base + min(r, more) for r in range(self.sp + 1)]
        queries = tuple(starmap(range, pairwise(edges)))
        group = self.heads // self.kv_heads
        kv = tuple(range(q[0] // group, q[-1] // group + 1) for q in queries)
        local = tuple(q // group - kv[self.rank][0] for q in queries[self.rank])
        each = len(local) // len(kv[self.rank])
        uniform = local == tuple(i // each for i in range(len(local)))
        object.__setattr__(self, "query_ranges", queries)
        object.__setattr__(self, "kv_ranges", kv)
        object.__setattr__(
            self, "widths", tuple(len(q) + 2 * len(k) for q, k in zip(queries, kv, strict=True))
        )
        object.__setattr__(self, "expansion", None if uniform else local)

    def to_heads(self, t: int) -> tuple[list[int], list[int]]:
        """Elements sent to and received from each rank on the way in, for t tokens a rank."""
        return [t * w * self.head_dim for w in self.widths], [
            t * self.widths[self.rank] * self.head_dim
        ] * self.sp

    def to_sequence(self, t: int) -> tuple[list[int], list[int]]:
        """Elements sent to and received from each rank on the way out."""
        mine = len(self.query_ranges[self.rank])
        return [t * mine * self.head_dim] * self.sp, [
            t * len(q) * self.head_dim for q in self.query_ranges
        ]


def split_heads(
    q_tNH: torch.Tensor,
    k_tKH: torch.Tensor,
    v_tKH: torch.Tensor,
    plan: HeadPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Lay q, k and v out for the all-to-all: flat, rank after rank, cast to `dtype`. q, k, v come
    in at least fp32.
    """
    parts = [
        torch.cat(
            [
                q_tNH[:, q.start : q.stop],
                k_tKH[:, kv.start : kv.stop],
                v_tKH[:, kv.start : kv.stop],
            ],
            1,
        )
        for q, kv in zip(plan.query_ranges, plan.kv_ranges, strict=True)
    ]
    if len(set(plan.widths)) == 1:
        return torch.stack(parts).to(dtype).flatten()
    return torch.cat([p.to(dtype).flatten() for p in parts])


def q_k_v(
    received: torch.Tensor, plan: HeadPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The received buffer as q [T, n, H], k and v [T, k, H]: views, unless kv must be expanded per
    query head.
    """
    n = len(plan.query_ranges[plan.rank])
    k = len(plan.kv_ranges[plan.rank])
    heads = received.view(-1, n + 2 * k, plan.head_dim)
    query, key, value = heads.split([n, k, k], 1)
    if plan.expansion is not None:
        key = _expand(key, plan.expansion)
        value = _expand(value, plan.expansion)
    return query, key, value


def _expand(kv_TkH: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """One kv head per query head; through fp32 where the dtype is lower, so that the backward adds
    the copies in fp32.
    """
    wide = kv_TkH.to(torch.promote_types(kv_TkH.dtype, torch.float32))
    return torch.stack([wide[:, i] for i in heads], 1).to(kv_TkH.dtype)


def join_heads(received: torch.Tensor, plan: HeadPlan) -> torch.Tensor:
    """The buffer that came back from the head ranks → [t, N, H]."""
    if plan.sp == 1:
        return received.view(-1, plan.heads, plan.head_dim)
    counts = [len(q) for q in plan.query_ranges]
    t = received.shape[0] // (plan.heads * plan.head_dim)
    if len(set(counts)) == 1:
        return (
            received.view(plan.sp, t, counts[0], plan.head_dim)
            .transpose(0, 1)
            .reshape(t, plan.heads, plan.head_dim)
        )
    parts = received.split([t * c * plan.head_dim for c in counts])
    return torch.cat([p.view(t, c, plan.head_dim) for p, c in zip(parts, counts, strict=True)], 1)
