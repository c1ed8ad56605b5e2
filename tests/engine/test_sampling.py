"""The sampler against exact distributions, and against its own definition computed with Python's
integers.
"""

from __future__ import annotations

import math
import time
from itertools import accumulate

import numpy as np
import pytest
import torch

from retool.engine.kernels.draws import BLOCK, FIRST, GOLDEN, MASK, SECOND, Draws, seed_key
from retool.engine.kernels.sampling import cutoff, mixed, picked, sample, uniforms

LOGITS = torch.tensor([2.0, 1.5, 1.5, 0.3, -0.2, -1.0, -3.0, -8.0], dtype=torch.float64)


def draws(count: int, temperature: float, top_k: int, top_p: float, seed: int = 0) -> Draws:
    """One row per position of a single seed."""
    return Draws(
        torch.full((count,), seed_key((seed, 5))),
        torch.arange(count),
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
    )


def exact(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution, by the definition: likeliest first until top_k, then until their share
    reaches top_p.
    """
    weights = [math.exp(x / temperature) for x in LOGITS.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = [
        i for i in order if top_k <= 0 or weights[i] >= weights[order[min(top_k, len(order)) - 1]]
    ]
    total = sum(weights[i] for i in kept)
    share = 0.0
    chosen = []
    for i in kept:
        if share >= top_p * total and weights[i] < weights[chosen[-1]]:
            break
        chosen.append(i)
        share += weights[i]
    return np.array(
        [
            weights[i] / sum(weights[j] for j in chosen) if i in chosen else 0.0
            for i in range(len(weights))
        ]
    )


def fits(seen: np.ndarray, expected: np.ndarray) -> bool:
    """A chi-square test at the 1e-4 level; the expected counts have the seen ones' sum."""
    degrees = len(expected) - 1
    if degrees == 0:
        return True
    statistic = float(((seen - expected) ** 2 / expected).sum())
    z = 3.72  # one-sided 1e-4, Wilson & Hilferty 1931
    return statistic < degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, -1, 1.0),
        (0.5, -1, 1.0),
        (2.0, 0, 1.0),
        (1.0, 4, 1.0),
        (1.0, 2, 1.0),
        (1.0, -1, 0.6),
        (1.0, -1, 0.97),
        (1.5, 6, 0.8),
        (1.0, 99, 0.3),
    ],
)
def test_draws_follow_the_exact_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Of 40,000 draws; tokens that are filtered are never drawn; both log-probabilities exact."""
    count = 40_000
    want = exact(temperature, top_k, top_p)
    token, logp, behaviour = sample(
        LOGITS.repeat(count, 1), draws(count, temperature, top_k, top_p), top_k > 0 or top_p < 1
    )
    seen = np.bincount(token.long().numpy(), minlength=len(want))
    assert seen[want == 0].sum() == 0
    assert fits(seen[want > 0], count * want[want > 0])
    whole = torch.log_softmax(LOGITS / temperature, -1)
    torch.testing.assert_close(logp, whole[token.long()], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        behaviour, torch.from_numpy(want).log()[token.long()], atol=1e-6, rtol=0
    )


def wide(kind: str, vocab: int) -> torch.Tensor:
    """Logits of several blocks, the last one not whole."""
    normal = torch.randn(vocab, generator=torch.Generator().manual_seed(7))
    likely = torch.arange(vocab) == 700
    return {
        "flat": torch.zeros(vocab),
        "normal": 2 * normal,
        # A likely token, and a thousand of about a millionth each
        "tail": torch.where(likely, 13.8, 0.0),
        "gaps": torch.where(torch.arange(vocab) % 3 == 0, float("-inf"), normal),
    }[kind]


def seen_of(logits: torch.Tensor, count: int) -> np.ndarray:
    """How often each token is drawn at so many positions of one seed."""
    seen = np.zeros(len(logits), np.int64)
    every = draws(count, 1.0, -1, 1.0)
    for rows in torch.arange(count).split(10_000):
        some = Draws(*(value[rows] for value in every))
        tokens = sample(logits.repeat(len(rows), 1), some, False)[0]
        seen += np.bincount(tokens.long().numpy(), minlength=len(logits))
    return seen


def grouped(values: np.ndarray, p: np.ndarray, count: int) -> np.ndarray:
    """Sums over tokens alike, until 25 of each sum are expected."""
    order = np.argsort(p, kind="stable")
    group = (np.cumsum(p[order]) * count / 25).astype(int)
    return np.bincount(group, values[order])[np.unique(group)]


@pytest.mark.parametrize(
    ("kind", "vocab", "count"),
    [
        ("normal", 1100, 5_000),
        *(
            pytest.param(kind, 1500, 300_000, marks=pytest.mark.slow)
            for kind in ("flat", "normal", "tail", "gaps")
        ),
        pytest.param("normal", 1024, 300_000, marks=pytest.mark.slow),
    ],
)
def test_draws_from_many_blocks_follow_the_distribution(kind: str, vocab: int, count: int) -> None:
    logits = wide(kind, vocab)
    p = logits.double().softmax(-1).numpy()
    seen = seen_of(logits, count)
    assert seen[p == 0].sum() == 0
    assert fits(grouped(seen, p, count), grouped(count * p, p, count))


def test_neighbouring_positions_seeds_and_levels_are_independent() -> None:
    """Pairs of numbers fall evenly into 16 × 16 cells."""
    count = 100_000
    numbers, others = (uniforms(draws(count, 1.0, -1, 1.0, seed))[..., 0] for seed in (0, 1))
    of_block, of_token = (numbers * 16).long()
    cell = of_block * 16
    for other in (
        of_token,
        of_block.roll(1),
        of_token.roll(1),
        of_token.roll(-1),
        of_block.roll(32),
        *(others * 16).long(),
    ):
        seen = torch.bincount(cell + other, minlength=256).numpy()
        assert fits(seen, np.full(256, count / 256))


def by_hand(logits: list[float], key: int, position: int) -> int:
    """The definition, with Python's numbers."""
    block, place = (
        ((mixed_int(key + (2 * position + level) * GOLDEN) >> 12) + 0.5) / 2**52
        for level in range(2)
    )
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    sums = [sum(weights[start : start + BLOCK]) for start in range(0, len(weights), BLOCK)]
    first = BLOCK * first_above(sums, block)
    return first + first_above(weights[first : first + BLOCK], place)


def mixed_int(z: int) -> int:
    z &= MASK
    z = (z ^ (z >> 30)) * FIRST & MASK
    z = (z ^ (z >> 27)) * SECOND & MASK
    return z ^ (z >> 31)


def first_above(weights: list[float], uniform: float) -> int:
    total = sum(weights)
    return next(i for i, w in enumerate(accumulate(weights)) if w > uniform * total)


def test_draws_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(24, 1300, generator=generator) * 2
    keys, positions = torch.randint(-(2**63), 2**63 - 1, (2, 24), generator=generator)
    ones = torch.ones(24)
    asked = Draws(keys, positions, ones, -ones.long(), ones)
    rows = zip(logits.tolist(), keys.tolist(), positions.tolist(), strict=True)
    want = [by_hand(*row) for row in rows]
    assert sample(logits.double(), asked, False)[0].tolist() == want
    assert sample(logits.clone(), asked, False)[0].tolist() == want


def test_a_row_is_drawn_alike_whatever_the_batch_and_the_dtype() -> None:
    rows = 300
    logits = torch.randn(rows, 5000, generator=torch.Generator().manual_seed(2))
    # From flat rows to peaked ones
    logits *= torch.linspace(0, 8, rows)[:, None]
    asked = draws(rows, 1.0, -1, 1.0)
    together = sample(logits.clone(), asked, False)
    assert torch.equal(together[0].double(), sample(logits.double(), asked, False)[0])
    for row in (0, 150, 299):
        just = Draws(*(value[row : row + 1] for value in asked))
        alone = sample(logits[row : row + 1].clone(), just, False)
        assert torch.equal(alone[:, 0], together[:, row])


def test_the_generator_is_splitmix64() -> None:
    """The published first outputs for seed 1234567, and the tensor version against Python's
    integers.
    """
    state = 1234567
    out = []
    for _ in range(3):
        state = (state + (GOLDEN & MASK)) & MASK
        out.append(
            int(mixed(torch.tensor([state - (1 << 64) if state >> 63 else state]))[0]) & MASK
        )
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert (
        len({seed_key(s) for s in ((), (0,), (0, 0), (1,), (1, 0), (0, 1), (-1,), (1 << 64,))}) == 8
    )


def test_the_ends_of_the_range_pick_what_has_weight() -> None:
    weights = torch.tensor([[0.0, 0.0, 1e-30, 1.0, 0.7, 0.0, 1e-9, 0.0]], dtype=torch.float64)
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert picked(weights.repeat(3, 1), ends[:, None])[:, 0].tolist() == [2, 3, 6]
    # The smallest and the largest number there can be
    assert (0.5 * 2.0**-52, (2**52 - 0.5) * 2.0**-52) == (2.0**-53, 1 - 2.0**-53)


@pytest.mark.parametrize("vocab", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 1500])
def test_a_token_alone_is_always_drawn(vocab: int) -> None:
    for token in {0, vocab // 2, vocab - 1}:
        logits = torch.full((30, vocab), float("-inf"))
        logits[:, token] = -1e4
        asked = draws(30, 0.01, -1, 1.0)
        asked = asked._replace(temperature=torch.tensor([0.0, 0.01, 1e4]).repeat(10))
        drawn = sample(logits, asked, False)
        assert drawn[0].tolist() == [token] * 30 and not drawn[1:].any()


def test_logits_that_are_nan_give_a_token_and_no_number() -> None:
    logits = torch.zeros(2, 700)
    logits[0, 650] = float("nan")
    token, logp, _ = sample(logits, draws(2, 1.0, -1, 1.0), False)
    assert 0 <= token[0] < 700 and logp.isnan().tolist() == [True, False]


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(2, 1500)
    logits[:, [600, 601, 1400]] = 1.0
    asked = draws(2, 0.0, -1, 1.0)
    assert sample(logits, asked, False)[0].tolist() == [600, 600]


def test_greedy_rows_beside_sampled_ones() -> None:
    logits = LOGITS.repeat(3, 1)
    mixed_draws = Draws(
        torch.zeros(3, dtype=torch.int64),
        torch.arange(3),
        torch.tensor([0.0, 1.0, 0.0]),
        torch.tensor([-1, 2, 1]),
        torch.tensor([0.1, 1.0, 1.0]),
    )
    token, logp, behaviour = sample(logits, mixed_draws, True)
    assert token[0] == token[2] == 0 and behaviour[0] == behaviour[2] == 0 and behaviour[1] < 0
    assert abs(logp[0] - LOGITS.log_softmax(-1)[0]) < 1e-12


def test_cutoff_keeps_ties_and_the_token_that_crosses() -> None:
    x = LOGITS.repeat(4, 1)
    least = cutoff(x, torch.tensor([2, -1, -1, 3]), torch.tensor([1.0, 0.01, 1.0, 0.9]))
    assert least.tolist() == [1.5, 2.0, -8.0, 1.5]


def kept_by(row: np.ndarray, top_k: int, top_p: float) -> int:
    """How many of a row's tokens are left, by the definition, in float64."""
    weights = np.exp(np.sort(row.astype(np.float64))[::-1])
    left = weights[:top_k] if top_k > 0 else weights
    before = np.cumsum(left) - left
    return int((before < np.float32(top_p) * left.sum()).sum())


def test_cutoff_finds_the_token_that_crosses_among_150_000() -> None:
    rows = 12
    # From rows in which a few tokens have nearly everything to rows in which many are alike
    spread = torch.linspace(6, 1, rows)[:, None]
    x = torch.randn(rows, 151_936, generator=torch.Generator().manual_seed(1)) * spread
    top_k = torch.tensor([-1, -1, 50, -1, 5_000, -1] * 2)
    top_p = torch.tensor([0.6, 0.95, 0.9, 0.7, 0.8, 1.0] * 2)
    kept = (x >= cutoff(x, top_k, top_p)[:, None]).sum(1)
    asked = zip(x.numpy(), top_k.tolist(), top_p.tolist(), strict=True)
    assert kept.tolist() == [kept_by(*row) for row in asked]
    assert min(kept) < 100 and max(kept) > 1024  # of the few that are looked at first, and not


def test_a_cutoff_does_not_sort_the_whole_vocabulary() -> None:
    x = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(1)) * 6
    every = torch.full((4,), -1)
    most = torch.full((4,), 0.6)
    seconds = []
    for what in (lambda: cutoff(x, every, most), lambda: x.sort(-1)):
        begin = time.process_time()
        what()
        seconds.append(time.process_time() - begin)
    assert seconds[0] < 0.5 * seconds[1]
