"""Advantages from scores: pure functions on numbers of the whole step's batch, in float64.

`scores` float [n], one per trajectory; `groups` int [n], equal for samples of one prompt.
`token_rewards` and `masks` are one array per trajectory, over all of its tokens; only sampled
tokens (`masks` True) have advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

EPS = 1e-6
Tokens = Sequence[np.ndarray]


def grpo(scores: np.ndarray, groups: np.ndarray, norm_by_std: bool = True) -> np.ndarray:
    """(s - mean)/(std + 1e-6) within the group, std unbiased: DeepSeekMath, arXiv 2402.03300.
    Without `norm_by_std` only the mean is subtracted: Dr. GRPO, arXiv 2503.20783. A group of one
    keeps its score.
    """
    out = np.array(scores, np.float64)
    for members in _groups(groups):
        if len(members) > 1:
            centred = out[members] - out[members].mean()
            out[members] = centred / (out[members].std(ddof=1) + EPS) if norm_by_std else centred
    return out


def rloo(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """s minus the mean of the group's others: leave-one-out REINFORCE, arXiv 2402.14740.

    A group of one keeps its score.
    """
    out = np.array(scores, np.float64)
    for members in _groups(groups):
        n = len(members)
        if n > 1:
            out[members] = (out[members] - out[members].mean()) * n / (n - 1)
    return out


def reinforce_plus_plus(
    token_rewards: Tokens, masks: Tokens, gamma: float = 1.0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(advantages, returns): discounted returns over sampled tokens, whitened over the whole batch:
    arXiv 2501.03262, eq. 7-9.

    Tokens that weren't sampled are passed over: they neither discount nor carry a reward.
    """
    returns = []
    for rewards, mask in zip(token_rewards, masks, strict=True):
        total = 0.0
        out = np.zeros(len(rewards))
        for i in np.flatnonzero(mask)[::-1]:
            total = float(rewards[i]) + gamma * total
            out[i] = total
        returns.append(out)
    return whiten(returns, masks), returns


def reinforce_plus_plus_baseline(
    scores: np.ndarray, groups: np.ndarray, masks: Tokens
) -> list[np.ndarray]:
    """The group's mean subtracted, then whitened over all sampled tokens of the batch: arXiv
    2501.03262, section 3.3.
    """
    return whiten(spread(grpo(scores, groups, norm_by_std=False), masks), masks)


def whiten(values: Tokens, masks: Tokens) -> list[np.ndarray]:
    """(x - mean)/sqrt(var + 1e-8) over all sampled tokens of the batch, the variance unbiased; 0
    elsewhere.
    """
    chosen = (
        np.concatenate([v[m] for v, m in zip(values, masks, strict=True)])
        if len(values)
        else np.zeros(0)
    )
    mean = chosen.mean() if len(chosen) else 0.0
    scale = np.sqrt((chosen.var(ddof=1) if len(chosen) > 1 else 0.0) + 1e-8)
    return [np.where(m, (v - mean) / scale, 0.0) for v, m in zip(values, masks, strict=True)]


def spread(values: np.ndarray, masks: Tokens) -> list[np.ndarray]:
    """A number per trajectory as the same number on each of its sampled tokens, 0 elsewhere."""
    return [np.where(mask, value, 0.0) for value, mask in zip(values, masks, strict=True)]


def place_reward(reward: float, mask: np.ndarray) -> np.ndarray:
    """A trajectory's reward on its last sampled token; nowhere, where nothing was sampled."""
    out = np.zeros(len(mask))
    sampled = np.flatnonzero(mask)
    if len(sampled):
        out[sampled[-1]] = reward
    return out


def estimate(
    name: str,
    token_rewards: Tokens,
    masks: Tokens,
    groups: np.ndarray,
    norm_by_std: bool = True,
    gamma: float = 1.0,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(advantages, returns) per token for `algorithm.adv_estimator=name`. Outcome estimators score
    a trajectory by the sum of its token rewards (with the KL in the reward that isn't one number);
    their returns are their advantages.
    """
    if name == "reinforce_plus_plus":
        return reinforce_plus_plus(token_rewards, masks, gamma)
    scores = np.array(
        [float(rewards[mask].sum()) for rewards, mask in zip(token_rewards, masks, strict=True)],
        np.float64,
    )
    made = OUTCOME[name](scores, groups, masks, norm_by_std)
    return made, made


def _groups(groups: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(groups == g) for g in np.unique(groups)]


Outcome = Callable[[np.ndarray, np.ndarray, Tokens, bool], list[np.ndarray]]
OUTCOME: dict[str, Outcome] = {
    "grpo": lambda scores, groups, masks, norm: spread(grpo(scores, groups, norm), masks),
    "rloo": lambda scores, groups, masks, norm: spread(rloo(scores, groups), masks),
    "reinforce_plus_plus_baseline": lambda scores, groups, masks, norm: (
        reinforce_plus_plus_baseline(scores, groups, masks)
    ),
}
