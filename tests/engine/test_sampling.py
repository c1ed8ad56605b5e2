"""The sampler against exact distributions, and against its own definition computed with Python's
integers.
"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from retool.engine.kernels.draws import GOLDEN, MASK, Draws, seed_key
from retool.engine.kernels.sampling import cutoff, gumbel, mixed, row_keys, sample

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
    """A chi-square test of 40,000 draws at the 1e-4 level; tokens that are filtered are never
    drawn; both log-probabilities exact.
    """
    count = 40_000
    want = exact(temperature, top_k, top_p)
    token, logp, behaviour = sample(
        LOGITS.repeat(count, 1), draws(count, temperature, top_k, top_p), top_k > 0 or top_p < 1
    )
    seen = np.bincount(token.long().numpy(), minlength=len(want))
    assert seen[want == 0].sum() == 0
    possible = want > 0
    statistic = float(((seen - count * want)[possible] ** 2 / (count * want[possible])).sum())
    degrees = int(possible.sum()) - 1
    if degrees:
        z = 3.72  # one-sided 1e-4, Wilson & Hilferty 1931
        assert statistic < degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
    whole = torch.log_softmax(LOGITS / temperature, -1)
    torch.testing.assert_close(logp, whole[token.long()], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        behaviour, torch.from_numpy(want).log()[token.long()], atol=1e-6, rtol=0
    )


def test_neighbouring_positions_seeds_and_tokens_are_independent() -> None:
    """Correlations of the noise over 2,000 × 64 draws stay within five standard deviations of zero,
    its moments are Gumbel's.
    """
    noise = gumbel(row_keys(draws(2000, 1.0, -1, 1.0)), 64).double()
    other = gumbel(row_keys(draws(2000, 1.0, -1, 1.0, seed=1)), 64).double()
    euler = 0.5772156649
    deviation = math.pi / math.sqrt(6)
    assert abs(noise.mean() - euler) < 5 * deviation / math.sqrt(noise.numel())
    assert abs(noise.std() - deviation) < 0.02
    standard = (noise - euler) / deviation
    second = (other - euler) / deviation
    for a, b in (
        (standard[1:], standard[:-1]),
        (standard[:, 1:], standard[:, :-1]),
        (standard, second),
    ):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


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


def test_rare_tokens_can_win() -> None:
    """Noise beyond 20 exists (32 bits of it), is finite, and never undefined."""
    keys = torch.arange(3000) * 7919
    noise = gumbel(keys, 4096)
    assert torch.isfinite(noise).all() and noise.max() > 14.5 and noise.min() > -2.9


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
