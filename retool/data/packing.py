"""Which samples of an optimizer step go into which micro-batch of which data-parallel rank.

[Note: balance] Ranks join the same collectives, so they run the same number of micro-batches, and
micro-batch j takes as long as its most expensive one. Samples are therefore first spread over all
micro-batches of all ranks, the dearest sample to the cheapest micro-batch that has room; the
micro-batches are then sorted by cost and dealt in rounds, so that those that run at the same time
cost about the same. The cost of a sample of n tokens is `n + n²/quadratic_length`: attention is
quadratic, and equals everything else at `quadratic_length` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# where causal attention costs as much as the rest of a 0.5B-parameter model; of another:
# perf.quadratic_length
QUADRATIC_LENGTH = 24_000

# [dp rank][micro-batch][index of a sample]; an empty micro-batch is a dummy pack
Plan = list[list[list[int]]]


def cost(length: int | np.ndarray, quadratic_length: int = QUADRATIC_LENGTH) -> float | np.ndarray:
    """Relative time of a sample of `length` tokens, in tokens of a short sample."""
    return length + length * (length / quadratic_length)


def plan_step(
    lengths: Sequence[int] | np.ndarray,
    dp: int,
    sp: int = 1,
    micro_batch_size: int | None = None,
    max_tokens_per_gpu: int | None = None,
    quadratic_length: int = QUADRATIC_LENGTH,
) -> Plan:
    """Plan one optimizer step over samples of these `lengths`; every sample is in exactly one
    micro-batch.

    Either `micro_batch_size` samples at most per micro-batch of one sp group, or a budget of
    `max_tokens_per_gpu` (a group of sp ranks holds sp times that; a longer sample is a micro-batch
    of its own). Every rank gets the same number of micro-batches; a short rank has empty ones. A
    function of its arguments alone. Raises ValueError for nonsense limits.
    """
    if (micro_batch_size is None) == (max_tokens_per_gpu is None):
        raise ValueError(
            "give one of data.micro_batch_size_per_gpu and data.max_token_len_per_gpu."
        )
    limit = micro_batch_size if micro_batch_size is not None else max_tokens_per_gpu
    if limit is None or limit < 1:
        name = (
            "data.micro_batch_size_per_gpu"
            if micro_batch_size is not None
            else "data.max_token_len_per_gpu"
        )
        raise ValueError(f"{name}={limit} must be at least 1.")
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) == 0:
        return [[] for _ in range(dp)]
    costs = np.asarray(cost(sizes, quadratic_length), np.float64)
    weights, capacity = (
        (np.ones_like(sizes), limit) if micro_batch_size is not None else (sizes, limit * sp)
    )
    bins = _fill(weights, costs, capacity, dp)
    return _deal(bins, costs, dp)


def _fill(weights: np.ndarray, costs: np.ndarray, capacity: int, dp: int) -> list[list[int]]:
    """The fewest micro-batches (a multiple of dp) that hold everything, as evenly as they can."""
    alone = weights > capacity
    fewest = int(alone.sum()) + -(-int(weights[~alone].sum()) // capacity)
    count = -(-max(fewest, 1) // dp) * dp
    while True:
        for key in (costs, None):
            bins = _fill_into(count, weights, capacity, key)
            if bins is not None:
                return bins
        count += dp


def _fill_into(
    count: int, weights: np.ndarray, capacity: int, costs: np.ndarray | None
) -> list[list[int]] | None:
    """Fill `count` bins: each sample, largest first, into the cheapest bin with room (or, without
    costs, the fullest). None: no room.
    """
    order = np.argsort(-(weights if costs is None else costs), kind="stable")
    bins: list[list[int]] = [[] for _ in range(count)]
    held = np.zeros(count, np.int64)
    spent = np.zeros(count)
    for i in order.tolist():
        fits = (held + weights[i] <= capacity) | (held == 0)
        if not fits.any():
            return None
        best = int(np.argmin(np.where(fits, spent if costs is not None else -held, np.inf)))
        bins[best].append(i)
        held[best] += weights[i]
        if costs is not None:
            spent[best] += costs[i]
    return bins


def _deal(bins: list[list[int]], costs: np.ndarray, dp: int) -> Plan:
    """Deal the bins, dearest first, in rounds of dp: in each round the dearest goes to the rank
    with the least work so far.
    """
    totals = [float(costs[members].sum()) for members in bins]
    order = sorted(range(len(bins)), key=lambda b: (-totals[b], b))
    plan: Plan = [[] for _ in range(dp)]
    work = [0.0] * dp
    for first in range(0, len(order), dp):
        ranks = sorted(range(dp), key=lambda rank: (work[rank], rank))
        for rank, b in zip(ranks, order[first : first + dp], strict=True):
            plan[rank].append(sorted(bins[b]))
            work[rank] += totals[b]
    return plan
