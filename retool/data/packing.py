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
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

import numpy as np

# Tokens at which causal attention costs as much as the rest of a 0.5B-parameter model. For another
# model: `retool.model.costs.quadratic_length`.
QUADRATIC_LENGTH = 24_000

# [Note: whole documents] Ulysses divides every document over sp ranks, and each layer pays for that
# with four all-to-alls. Where a micro-batch's documents spread evenly over the ranks as they are, each
# rank computes its own, and nothing is sent. "Evenly" is up to this share of work more than divided
# documents would make, less than what the all-to-alls cost. A rank with few tokens waits for its host,
# for which all-to-alls are work: it takes them however they spread.
UNEVEN = 1.03
# Tokens of a rank that are few for a 0.5B-parameter model. For another:
# `retool.model.costs.few_tokens`.
FEW_TOKENS = 2_000

# Tokens of a rank in a recorded micro-batch. It has room for so many documents that each may have few
# tokens, as long as any of them may be: attention's kernels look at each part of each of them.
SMALLEST_RECORDED = 128
LARGEST_RECORDED = 2048
TOKENS_OF_A_DOCUMENT = 32
LEAST_ROOM = 3 * TOKENS_OF_A_DOCUMENT  # `PackedBatch.room` of one document

# [data-parallel rank][micro-batch][index of a sample]; an empty micro-batch is a dummy pack
Plan = list[list[list[int]]]


@dataclass(frozen=True)
class Budget:
    """What one micro-batch may hold: tokens per GPU, or a number of samples. Give one of them.

    A group of sp sequence-parallel ranks shares a micro-batch, so it holds sp times
    `max_tokens_per_gpu`. `quadratic_length` balances the work (see the note above), `few_tokens` are
    too few to keep a GPU busy (see the note on whole documents).

    Raises ValueError for none or both, and for a limit below 1.
    """

    max_tokens_per_gpu: int | None = None
    micro_batch_size: int | None = None
    quadratic_length: int = QUADRATIC_LENGTH
    few_tokens: int = FEW_TOKENS

    def __post_init__(self) -> None:
        limits = {
            "data.micro_batch_size_per_gpu": self.micro_batch_size,
            "data.max_token_len_per_gpu": self.max_tokens_per_gpu,
        }
        given = {key: limit for key, limit in limits.items() if limit is not None}
        if len(given) != 1:
            raise ValueError(f"give one of {' and '.join(limits)}.")
        for key, limit in given.items():
            if limit < 1:
                raise ValueError(f"{key}={limit} must be at least 1.")


@dataclass(frozen=True)
class Packing:
    """How the samples of a step become the packs of data-parallel rank `dp_rank` of `dp`.

    A pack's length is a multiple of `sp`. With `keep_whole` its documents aren't divided over the
    sp ranks where they spread evenly (see the note on whole documents). `room`: the tokens of a GPU
    that memory is planned for, where the budget is a number of samples. `pad_to` first pads every
    sample to that length with the token `pad_id`: the baseline of data.use_remove_padding=false.
    `recorded`: small packs are, so they tell `PackedBatch.room`, for which every rank looks at the
    samples of all.
    """

    budget: Budget
    dp_rank: int = 0
    dp: int = 1
    sp: int = 1
    pad_to: int | None = None
    pad_id: int = 0
    keep_whole: bool = True
    room: int | None = None
    recorded: bool = False


def cost(length: int | np.ndarray, quadratic_length: int = QUADRATIC_LENGTH) -> float | np.ndarray:
    """Relative time of a sample of `length` tokens, in tokens of a short sample."""
    return length + length * (length / quadratic_length)


def plan_step(lengths: Sequence[int] | np.ndarray, budget: Budget, dp: int, sp: int = 1) -> Plan:
    """Plan one optimizer step over samples of these `lengths`; each is in exactly one micro-batch.

    A sample that is longer than a budget of tokens is a micro-batch of its own. Every rank gets the
    same number of micro-batches; a short rank has empty ones. The plan depends on the arguments
    alone, so every rank makes the same one.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) == 0:
        return [[] for _ in range(dp)]
    costs = np.asarray(cost(sizes, budget.quadratic_length), np.float64)
    if budget.max_tokens_per_gpu is not None:
        micro_batches = _fill(sizes, costs, budget.max_tokens_per_gpu * sp, dp)
    else:
        assert budget.micro_batch_size is not None
        micro_batches = _fill(np.ones_like(sizes), costs, budget.micro_batch_size, dp)
    return _deal(micro_batches, costs, dp)


def whole_shares(lengths: Sequence[int], packing: Packing) -> list[list[int]] | None:
    """The samples of a micro-batch that each of sp ranks computes whole; None if they are divided.

    See [Note: whole documents]. No rank gets more tokens than its budget, or `room`, allows.
    """
    sp = packing.sp
    if sp == 1 or not packing.keep_whole or packing.pad_to is not None or len(lengths) < sp:
        return None
    sizes = np.asarray(lengths, np.int64)
    costs = np.asarray(cost(sizes, packing.budget.quadratic_length), np.float64)
    # A capacity of everything: here only evenness matters, and room is checked below.
    shares = _fill_evenly(sp, sizes, int(sizes.sum()), costs)
    assert shares is not None
    # Two measures of evenness: tokens are padded to the longest share, and work waits for the
    # dearest.
    longest = max(int(sizes[share].sum()) for share in shares)
    dearest = max(float(costs[share].sum()) for share in shares)
    divided = _divide_up(int(sizes.sum()), sp)
    room = packing.budget.max_tokens_per_gpu or packing.room
    if room is not None and longest > max(room, divided):
        return None
    even = longest <= divided * UNEVEN and dearest <= costs.sum() / sp * UNEVEN
    return shares if even or longest <= packing.budget.few_tokens else None


def shared_room(micro_batches: Sequence[Sequence[int]], packing: Packing) -> int:
    """`PackedBatch.room` of micro-batches, one for each data-parallel rank, with samples of these
    lengths; 0 where they aren't small for a GPU.
    """
    few = packing.budget.few_tokens * packing.sp
    if max(map(sum, micro_batches)) > few:
        return 0
    room = 1
    for lengths in micro_batches:
        shares = whole_shares(lengths, packing)
        if packing.sp == 1:
            shares = [list(range(len(lengths)))]
        if shares is None:
            return 0
        for share in shares:
            # Two documents more: what fills a rank's part up to the others, and to a round size
            documents = len(share) + 2
            tokens = sum(lengths[i] for i in share)
            room = max(room, tokens, documents * TOKENS_OF_A_DOCUMENT)
    return room


def recorded_size(room: int) -> int:
    """Tokens of a rank that a pack is padded to where it is recorded: one of few sizes."""
    step = SMALLEST_RECORDED if room <= 4 * SMALLEST_RECORDED else 2 * SMALLEST_RECORDED
    return max(_divide_up(room, step), 1) * step


def _fill(weights: np.ndarray, costs: np.ndarray, capacity: int, dp: int) -> list[list[int]]:
    """The fewest micro-batches (a multiple of dp) that hold everything, with even costs.

    `weights` [n] is what each sample takes of `capacity`.
    """
    # These share with nobody, so they count one each
    alone = weights > capacity
    fewest = int(alone.sum()) + _divide_up(int(weights[~alone].sum()), capacity)
    count = _divide_up(max(fewest, 1), dp) * dp
    while True:
        # Even costs may need more micro-batches than the tightest filling does.
        filled = _fill_evenly(count, weights, capacity, costs)
        if filled is None:
            filled = _fill_tightly(count, weights, capacity)
        if filled is not None:
            return filled
        count += dp


def _fill_evenly(
    count: int, weights: np.ndarray, capacity: int, costs: np.ndarray
) -> list[list[int]] | None:
    """Each sample, dearest first, into the cheapest micro-batch with room; None without room."""
    micro_batches: list[list[int]] = [[] for _ in range(count)]
    room = [capacity] * count
    # Two heaps: those that may have room, the cheapest first; and those that had none, by their room
    cheapest = [(0.0, number) for number in range(count)]
    without: list[tuple[int, float, int]] = []
    each = list(zip(weights.tolist(), costs.tolist(), strict=True))
    for i in np.argsort(-costs, kind="stable").tolist():
        weight, cost_of = each[i]
        # Samples get shorter: what had no room for one may have it for the next
        while without and -without[0][0] >= weight:
            _, spent, number = heappop(without)
            heappush(cheapest, (spent, number))
        # What is larger than the budget fits where nothing else is
        while cheapest and room[cheapest[0][1]] < min(weight, capacity):
            spent, number = heappop(cheapest)
            heappush(without, (-room[number], spent, number))
        if not cheapest:
            return None
        spent, number = cheapest[0]
        micro_batches[number].append(i)
        room[number] -= weight
        heapreplace(cheapest, (spent + cost_of, number))
    return micro_batches


def _fill_tightly(count: int, weights: np.ndarray, capacity: int) -> list[list[int]] | None:
    """Each sample, largest first, into the fullest micro-batch with room; None without room."""
    micro_batches: list[list[int]] = [[] for _ in range(count)]
    held = np.zeros(count, np.int64)
    for i in np.argsort(-weights, kind="stable").tolist():
        fits = (held + weights[i] <= capacity) | (held == 0)
        if not fits.any():
            return None
        fullest = int(np.argmin(np.where(fits, -held, np.inf)))
        micro_batches[fullest].append(i)
        held[fullest] += weights[i]
    return micro_batches


def _deal(micro_batches: list[list[int]], costs: np.ndarray, dp: int) -> Plan:
    """Deal the micro-batches to the ranks in rounds of dp, dearest first.

    In each round the dearest goes to the rank with the least work so far.
    """
    totals = [float(costs[members].sum()) for members in micro_batches]
    # Ties by number, here and below: every rank must deal alike
    dearest_first = sorted(range(len(micro_batches)), key=lambda b: (-totals[b], b))
    plan: Plan = [[] for _ in range(dp)]
    work = [0.0] * dp
    for first in range(0, len(dearest_first), dp):
        ranks = sorted(range(dp), key=lambda rank: (work[rank], rank))
        dealt = dearest_first[first : first + dp]
        for rank, b in zip(ranks, dealt, strict=True):
            plan[rank].append(sorted(micro_batches[b]))
            work[rank] += totals[b]
    return plan


def _divide_up(total: int, part: int) -> int:
    """`total / part`, rounded up."""
    return -(-total // part)
