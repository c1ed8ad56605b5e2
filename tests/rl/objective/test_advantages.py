"""Advantages against hand-checked numbers and an independent dense computation."""

from __future__ import annotations

import numpy as np
import pytest

from retool.rl.objective.advantages import (
    ESTIMATORS,
    AdvantageInputs,
    estimate,
    grpo,
    place_reward,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
    whiten,
)


def test_grpo_by_hand() -> None:
    scores = np.array([1.0, 0.0, 0.0, 1.0, 5.0, 2.0, 2.0])
    groups = np.array([3, 3, 3, 3, 9, 4, 4])
    # group 3: mean 1/2, unbiased variance 4·(1/4)/3 = 1/3, so ±(1/2)/(0.5773503 + 1e-6); group 9 is
    # alone; group 4 is flat
    expected = 0.5 / (np.sqrt(1 / 3) + 1e-6)
    assert grpo(scores, groups) == pytest.approx(
        [expected, -expected, -expected, expected, 5.0, 0.0, 0.0], rel=1e-12
    )
    assert expected == pytest.approx(0.8660239, abs=1e-7)
    assert grpo(scores, groups, norm_by_std=False) == pytest.approx(
        [0.5, -0.5, -0.5, 0.5, 5.0, 0, 0]
    )


def test_rloo_by_hand() -> None:
    scores = np.array([1.0, 2.0, 6.0, 7.0])
    groups = np.array([0, 0, 0, 1])
    assert rloo(scores, groups) == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 7.0])


@pytest.mark.parametrize("score", [0.1, 12345.6, 1e8 / 3])
def test_equal_scores_have_no_advantage_however_large_they_are(score: float) -> None:
    """Their mean, rounded, leaves some 1e-16 of each; divided by 1e-6 it would be trained."""
    scores = np.full(33, score)
    groups = np.repeat([0, 1, 2], 11)
    masks = [np.ones(3, bool)] * 33
    assert not grpo(scores, groups).any() and not rloo(scores, groups).any()
    assert not np.any(reinforce_plus_plus([np.full(3, score)] * 33, masks, gamma=0.0)[0])


def test_groups_needn_t_lie_together(rng) -> None:
    scores = rng.normal(size=24)
    groups = np.repeat(np.arange(6), 4)
    order = rng.permutation(24)
    for estimator in (grpo, rloo):
        assert estimator(scores[order], groups[order]) == pytest.approx(
            estimator(scores, groups)[order]
        )


def test_reinforce_plus_plus_by_hand() -> None:
    """Two trajectories: rewards 1 at the end and -2 at the end, discount 1/2, tool text between
    sampled tokens passed over.
    """
    masks = [np.array([False, True, False, True]), np.array([False, True, True])]
    rewards = [place_reward(1.0, masks[0]), place_reward(-2.0, masks[1])]
    advantages, returns = reinforce_plus_plus(rewards, masks, gamma=0.5)
    assert returns[0].tolist() == [0, 0.5, 0, 1.0] and returns[1].tolist() == [0, -1.0, -2.0]
    flat = np.array([0.5, 1.0, -1.0, -2.0])
    z = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    assert [
        advantages[0][1],
        advantages[0][3],
        advantages[1][1],
        advantages[1][2],
    ] == pytest.approx(z.tolist())
    assert advantages[0][0] == advantages[0][2] == 0


def dense_reinforce_plus_plus(rewards, mask, gamma):
    """As published, on padded matrices: a backward recursion in which tokens that weren't sampled
    hand the return on.
    """
    returns = np.zeros_like(rewards)
    running = np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        running = np.where(mask[:, t], rewards[:, t] + gamma * running, running)
        returns[:, t] = running
    chosen = returns[mask]
    return np.where(mask, (returns - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8), 0)


def test_reinforce_plus_plus_against_the_dense_form(rng) -> None:
    mask = rng.random((8, 20)) < 0.6
    mask[:, 0] = False
    rewards = np.where(mask, rng.normal(size=mask.shape), 0)
    advantages, _ = reinforce_plus_plus(list(rewards), list(mask), gamma=0.97)
    assert np.stack(advantages) == pytest.approx(
        dense_reinforce_plus_plus(rewards, mask, 0.97), abs=1e-12
    )


def test_baseline_by_hand() -> None:
    masks = [np.array([True, True]), np.array([True, False])]
    advantages = reinforce_plus_plus_baseline(np.array([1.0, 0.0]), np.array([0, 0]), masks)
    flat = np.array([0.5, 0.5, -0.5])
    z = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    assert [*advantages[0], advantages[1][0]] == pytest.approx(z.tolist()) and advantages[1][1] == 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_only_sampled_tokens_have_advantages(name, rng) -> None:
    masks = [rng.random(n) < 0.5 for n in (5, 9, 3, 7)] + [np.zeros(4, bool)]
    rewards = [place_reward(r, m) for r, m in zip(rng.normal(size=5), masks, strict=True)]
    inputs = AdvantageInputs(rewards, masks, np.array([0, 0, 1, 1, 1]))
    advantages, returns = estimate(ESTIMATORS[name], inputs)
    for a, r, m in zip(advantages, returns, masks, strict=True):
        assert np.all(a[~m] == 0) and np.all(r[~m] == 0) and np.all(np.isfinite(a))


def test_a_trajectory_s_score_is_the_sum_of_its_token_rewards() -> None:
    """So that a KL penalty per token counts in the outcome estimators too."""
    mask = np.array([False, True, True])
    rewards = [np.array([0, -0.25, 1.0]), np.array([0, 0, 0.25])]
    inputs = AdvantageInputs(rewards, [mask, mask], np.array([0, 0]), norm_by_std=False)
    advantages, _ = estimate(ESTIMATORS["grpo"], inputs)
    assert [a.tolist() for a in advantages] == [[0, 0.25, 0.25], [0, -0.25, -0.25]]


def test_rewards_sit_on_the_last_sampled_token() -> None:
    assert place_reward(2.0, np.array([False, True, True, False])).tolist() == [0, 0, 2.0, 0]
    assert place_reward(2.0, np.array([False, False])).tolist() == [0, 0]


def test_whitening_nothing() -> None:
    assert (
        whiten([np.zeros(3)], [np.zeros(3, bool)])[0].tolist() == [0, 0, 0] and whiten([], []) == []
    )
