"""Ulysses sequence parallelism (Jacobs et al., arXiv 2309.14509): tokens are split outside
attention, heads inside it.

    q, k, v of this rank's tokens, all heads     [t, N, H], [t, K, H], [t, K, H]
      split_heads   (local)   one buffer: for each rank its query heads, and the kv heads they need
      all_to_all              one collective for q, k and v
      q_k_v         (local)   all tokens, this rank's heads: [T, n, H], [T, k, H], [T, k, H]
      attention
      all_to_all              rows of the output go back to the ranks that own those tokens
      join_heads    (local)   [t, N, H]

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

    All plain fields: the compiler reads them.
    """

    sp: int
    rank: int
    heads: int
    kv_heads: int
    head_dim: int
    # Query heads of each rank, and the kv heads that they read
    query_ranges: tuple[range, ...] = field(init=False, repr=False)
    kv_ranges: tuple[range, ...] = field(init=False, repr=False)
    # Heads (query + key + value) that each rank receives
    widths: tuple[int, ...] = field(init=False, repr=False)
    # This rank's kv head of each of its query heads; None where they group uniformly, as kernels
    # want it
    expansion: tuple[int, ...] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.sp <= self.heads:
            raise ValueError(
                f"ulysses_sequence_parallel_size={self.sp} exceeds the model's {self.heads} query "
                f"heads: each rank needs one. Use 1 to {self.heads}."
            )
        queries = _even_ranges(self.heads, self.sp)
        group = self.heads // self.kv_heads  # query heads that read one kv head
        # From the kv head of its first query head to that of its last: neighbours may both have
        # one.
        kv = tuple(range(q[0] // group, q[-1] // group + 1) for q in queries)
        widths = tuple(len(q) + 2 * len(k) for q, k in zip(queries, kv, strict=True))

        # This rank's kv head of each of its query heads, both counted from its first
        local = tuple(q // group - kv[self.rank][0] for q in queries[self.rank])
        readers = len(local) // len(kv[self.rank])
        uniform = local == tuple(i // readers for i in range(len(local)))

        object.__setattr__(self, "query_ranges", queries)
        object.__setattr__(self, "kv_ranges", kv)
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "expansion", None if uniform else local)

    @property
    def local_kv_heads(self) -> int:
        """How many kv heads this rank computes."""
        return len(self.kv_ranges[self.rank])

    def by_head(self, received: torch.Tensor) -> torch.Tensor:
        """The received buffer as [T, n + 2·k, H]."""
        return received.view(-1, self.widths[self.rank], self.head_dim)

    def to_heads(self, t: int) -> tuple[list[int], list[int]]:
        """Elements sent to and received from each rank on the way in, for t tokens a rank."""
        # Sizes may differ between ranks, and every rank computes those of all: nothing is asked for
        # first.
        sent = [t * width * self.head_dim for width in self.widths]
        received = [t * self.widths[self.rank] * self.head_dim] * self.sp
        return sent, received

    def to_sequence(self, t: int) -> tuple[list[int], list[int]]:
        """Elements sent to and received from each rank on the way out."""
        mine = len(self.query_ranges[self.rank])
        sent = [t * mine * self.head_dim] * self.sp
        received = [t * len(queries) * self.head_dim for queries in self.query_ranges]
        return sent, received


def _even_ranges(heads: int, ranks: int) -> tuple[range, ...]:
    """The heads of each rank, in order; the first `heads mod ranks` ranks have one more."""
    base, more = divmod(heads, ranks)
    edges = [rank * base + min(rank, more) for rank in range(ranks + 1)]
    return tuple(starmap(range, pairwise(edges)))


def split_heads(
    q_tNH: torch.Tensor,
    k_tKH: torch.Tensor,
    v_tKH: torch.Tensor,
    plan: HeadPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Lay q, k and v out for the all-to-all: flat, rank after rank, cast to `dtype`.

    q, k and v come in at least fp32: the gradients of a kv head's copies are added in that.
    """
    parts = []
    for q, kv in zip(plan.query_ranges, plan.kv_ranges, strict=True):
        heads = [
            q_tNH[:, q.start : q.stop],
            k_tKH[:, kv.start : kv.stop],
            v_tKH[:, kv.start : kv.stop],
        ]
        parts.append(torch.cat(heads, 1))
    # Equal parts are cast in one kernel.
    if len(set(plan.widths)) == 1:
        return torch.stack(parts).to(dtype).flatten()
    return torch.cat([part.to(dtype).flatten() for part in parts])


def q_k_v(
    received: torch.Tensor, plan: HeadPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The received buffer as q [T, n, H], k and v [T, k, H]: views, unless kv must be expanded per
    query head.
    """
    k = plan.local_kv_heads
    n = len(plan.query_ranges[plan.rank])
    query, key, value = plan.by_head(received).split([n, k, k], 1)
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
    counts = [len(queries) for queries in plan.query_ranges]
    t = received.shape[0] // (plan.heads * plan.head_dim)
    if len(set(counts)) == 1:
        # Equal parts need one copy; uneven ones are cut apart first
        by_rank = received.view(plan.sp, t, counts[0], plan.head_dim)
        return by_rank.transpose(0, 1).reshape(t, plan.heads, plan.head_dim)
    parts = received.split([t * count * plan.head_dim for count in counts])
    views = [part.view(t, n, plan.head_dim) for part, n in zip(parts, counts, strict=True)]
    return torch.cat(views, 1)
