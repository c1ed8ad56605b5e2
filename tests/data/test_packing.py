"""Plans: everything once, equal counts, never above the budget, balanced, and not more
micro-batches than needed.
"""

import math
import time
from itertools import product

import numpy as np
import pytest

from retool.data import packing as packing_module
from retool.data.packing import Budget, Packing, cost, plan_step, whole_shares
from retool.model.catalogue.families import parse_model_config
from retool.model.costs import few_tokens, model_flops, multiplied_parameters, quadratic_length


def check(lengths, dp, sp, size=None, budget=None):
    plan = plan_step(lengths, Budget(budget, size), dp, sp)
    assert len(plan) == dp and len({len(rank) for rank in plan}) == 1
    everything = sorted(i for rank in plan for members in rank for i in members)
    assert everything == list(range(len(lengths)))
    for members in (members for rank in plan for members in rank):
        if size is not None:
            assert len(members) <= size
        elif len(members) > 1:
            assert sum(lengths[i] for i in members) <= budget * sp
    return plan


@pytest.mark.parametrize("seed", range(8))
def test_everything_once_within_limits(seed):
    rng = np.random.default_rng(seed)
    lengths = (rng.lognormal(6, 1, rng.integers(1, 70)).astype(int) + 2).tolist()
    for dp, sp in product((1, 2, 3, 4, 7), (1, 2, 4)):
        check(lengths, dp, sp, size=int(rng.integers(1, 6)))
        check(lengths, dp, sp, budget=int(rng.integers(200, 3000)))


def test_sizes_are_full_where_they_divide():
    plan = check([100] * 16, 2, 2, size=2)
    assert [[len(members) for members in rank] for rank in plan] == [[2] * 4] * 2


def test_dp_need_not_divide_the_batch():
    plan = check(list(range(100, 1700, 100)), 3, 1, size=2)
    assert [len(rank) for rank in plan] == [3, 3, 3]
    short = check([5], 4, 1, size=1)
    assert sum(len(members) for rank in short for members in rank) == 1 and all(
        len(rank) == 1 for rank in short
    )


def test_a_longer_sample_is_alone():
    plan = check([50, 5000, 60, 70], 2, 1, budget=200)
    assert [1] in [members for rank in plan for members in rank]
    assert len(check([1000, 5], 1, 1, budget=10)[0]) == 2, "and takes no room of the others"


def filled_plainly(count, weights, capacity, costs):
    """Each sample, dearest first, into the cheapest micro-batch with room."""
    micro_batches = [[] for _ in range(count)]
    held = np.zeros(count, np.int64)
    spent = np.zeros(count)
    for i in np.argsort(-costs, kind="stable").tolist():
        fits = (held + weights[i] <= capacity) | (held == 0)
        if not fits.any():
            return None
        cheapest = int(np.argmin(np.where(fits, spent, np.inf)))
        micro_batches[cheapest].append(i)
        held[cheapest] += weights[i]
        spent[cheapest] += costs[i]
    return micro_batches


def seconds_to_fill(count, weights, capacity, costs):
    """Of ours and of the plain way, which fill alike; and whether there was room."""
    begun = time.process_time()
    found = packing_module._fill_evenly(count, weights, capacity, costs)
    between = time.process_time()
    assert found == filled_plainly(count, weights, capacity, costs)
    return between - begun, time.process_time() - between, found is not None


def test_filling_is_quick():
    """A rank plans for all, and looks at the micro-batches of all where small ones are recorded."""
    rng = np.random.default_rng(0)
    runs = []
    for seed in range(60):
        count = int(rng.choice([1, 2, 3, 8, 64]))
        sizes = rng.integers(1, 30, count * int(rng.integers(1, 6)))  # many of the same length
        weights = np.ones_like(sizes) if seed % 3 == 0 else sizes
        fair = -(-int(weights.sum()) // count)
        capacity = int(fair * rng.choice([0.9, 1, 1.1, 1.5, count]))
        costs = np.asarray(cost(sizes), np.float64)
        runs.append(seconds_to_fill(count, weights, capacity, costs))
    ours, plainly, filled = zip(*runs, strict=True)
    assert any(filled) and not all(filled)
    assert sum(ours) < sum(plainly) / 2


def test_filling_is_quick_where_most_have_no_room_left():
    """With samples as long as the budget may be, the cheapest are often too full for the next one."""
    sizes = np.random.default_rng(0).integers(1, 1000, 1500)
    costs = np.asarray(cost(sizes, 1000), np.float64)
    ours, plainly, _ = seconds_to_fill(800, sizes, 1000, costs)
    assert ours < plainly / 2


def test_a_tight_filling_is_found():
    """The dearest first into the cheapest would need a third micro-batch: 7, 5 + 4, 4 on 7, and no
    room for the last.
    """
    assert [sorted(members) for members in check([7, 5, 4, 4, 4], 1, 1, budget=12)[0]] in (
        [[0, 1], [2, 3, 4]],
        [[2, 3, 4], [0, 1]],
    )


def test_the_dearest_of_a_round_goes_where_least_was_to_do():
    plan = check([9, 5, 4, 3], 2, 1, size=1)
    assert plan == [[[0], [3]], [[1], [2]]]


@pytest.mark.parametrize("seed", range(5))
def test_few_micro_batches_and_even_work(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(100, 8000, 128)
    dp = 4
    budget = 16_384
    plan = check(lengths.tolist(), dp, 1, budget=budget)
    rounds = len(plan[0])
    assert rounds <= math.ceil(lengths.sum() / budget / dp * 1.1)  # the bound is a perfect filling
    work = [[sum(cost(int(lengths[i])) for i in members) for members in rank] for rank in plan]
    ideal = float(np.sum(cost(lengths))) / dp
    assert max(map(sum, work)) < 1.02 * ideal
    slowest = sum(max(rank[j] for rank in work) for j in range(rounds))
    assert slowest < 1.06 * ideal
    in_order = np.array_split(lengths, dp * rounds)  # the baseline: rows as they come
    naive = np.array([np.sum(cost(part)) for part in in_order]).reshape(dp, rounds).max(0).sum()
    assert slowest < naive


def test_long_samples_cost_more_than_their_tokens():
    """One long document weighs like more tokens of short ones, so it shares its rank with less."""
    lengths = [24_000] + [500] * 96
    plan = check(lengths, 2, 1, budget=40_000)
    tokens = [sum(lengths[i] for members in rank for i in members) for rank in plan]
    with_long = next(r for r, rank in enumerate(plan) if any(0 in members for members in rank))
    assert tokens[with_long] < tokens[1 - with_long]


def test_attention_costs_as_much_as_the_rest_where_the_model_says():
    """Half of the FLOPs of a document that long are attention's, and a plan for that length is more
    even than one for another model.
    """
    model = parse_model_config(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        }
    )
    assert few_tokens(model) == 138  # of FEW_TOKENS for a model with a fifteenth of its layer
    length = quadratic_length(model)
    assert model_flops(model, [length]) == pytest.approx(
        2 * 6 * multiplied_parameters(model) * length, rel=1e-4
    )
    lengths = np.random.default_rng(0).lognormal(8, 0.7, 256).astype(int).clip(256, 16_384)

    def slowest(planned_for):
        plan = plan_step(lengths, Budget(16_384, quadratic_length=planned_for), dp=8)
        work = [
            [sum(cost(int(lengths[i]), length) for i in members) for members in rank]
            for rank in plan
        ]
        return sum(max(rank[j] for rank in work) for j in range(len(work[0])))

    assert slowest(length) < slowest(24_000)


def test_deterministic_and_order_of_ties():
    lengths = [7, 7, 7, 9, 9, 1, 1, 1]
    pairs = Budget(micro_batch_size=2)
    assert plan_step(lengths, pairs, dp=2) == plan_step(np.array(lengths, np.int32), pairs, dp=2)


def test_bad_limits():
    with pytest.raises(ValueError, match="give one of"):
        Budget()
    with pytest.raises(ValueError, match="give one of"):
        Budget(1, 1)
    with pytest.raises(ValueError, match=r"micro_batch_size_per_gpu=0"):
        Budget(micro_batch_size=0)
    with pytest.raises(ValueError, match=r"max_token_len_per_gpu=-1"):
        Budget(-1)


def test_nothing_to_plan():
    assert plan_step([], Budget(micro_batch_size=2), dp=3) == [[], [], []]


def packing(sp: int = 2, budget: int | None = None, **others) -> Packing:
    return Packing(Budget(budget, None if budget else 99), sp=sp, **others)


@pytest.mark.parametrize("lengths", [[16_000, 16_000], [3_000, 1_400, 1_650], [100, 1_900, 700]])
def test_documents_that_spread_evenly_stay_whole(lengths: list[int]) -> None:
    shares = whole_shares(lengths, packing())
    assert shares is not None
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("lengths", "how"),
    [
        ([16_000, 14_000], packing()),  # one rank would wait for the other
        ([20_000, 5_000, 5_000, 5_000, 5_000], packing()),  # as many tokens, but not as much work
        ([16_000], packing()),
        ([16_000, 16_000], packing(sp=1)),
        ([16_000, 16_000], packing(keep_whole=False)),
        ([16_000, 16_000], packing(pad_to=16_384)),
        ([1_500, 900], packing(budget=1_200)),  # more than a rank may hold
        ([1_500, 900], Packing(Budget(None, 99, few_tokens=140), sp=2)),  # of a large model
        ([1_000, 1_000, 1_000], packing(room=1_500)),  # more than memory is planned for
    ],
)
def test_documents_that_dont_are_divided(lengths: list[int], how: Packing) -> None:
    assert whole_shares(lengths, how) is None
