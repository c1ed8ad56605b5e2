"""Advantages from rewards: pure functions on numbers of the whole step's batch, in float64.

`ESTIMATORS` at the end is the only list of them; a user's own is a function (`user_functions`).
Per-token values are one array per trajectory, over all of its tokens; only sampled tokens (`masks`
True) have advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

EPS = 1e-6
VARIANCE_EPS = 1e-8
PerToken = Sequence[np.ndarray]


@dataclass(frozen=True)
class AdvantageInputs:
    """A step's trajectories as an estimator sees them.

    `token_rewards` has each trajectory's reward on its last sampled token and, where the KL is in
    the reward, its penalty on every sampled token. With `algorithm.credit_turns` what a turn was
    given is on that turn's last token. `groups` int [n] is equal for samples of one
    prompt. `norm_by_std` and `gamma` are `algorithm.norm_adv_by_std_in_grpo` and `.gamma`.
    """

    token_rewards: PerToken
    masks: PerToken
    groups: np.ndarray
    norm_by_std: bool = True
    gamma: float = 1.0

    @cached_property
    def scores(self) -> np.ndarray:
        """float64 [n]: the sum of each trajectory's token rewards."""
        sums = [
            float(rewards[mask].sum())
            for rewards, mask in zip(self.token_rewards, self.masks, strict=True)
        ]
        return np.array(sums, np.float64)


# (advantages, returns): an array per trajectory each, over all of its tokens
Estimated = tuple[list[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator and what it needs.

    `compares_samples`: with one sample per prompt it has nothing to compare. `reads_norm_by_std`:
    it is another estimator with another `AdvantageInputs.norm_by_std`. `reads_token_rewards`: it
    matters to it on which token a reward is.
    """

    function: Callable[[AdvantageInputs], Estimated]
    compares_samples: bool = False
    reads_norm_by_std: bool = False
    reads_token_rewards: bool = False


# --- by trajectory ---


def grpo(scores: np.ndarray, groups: np.ndarray, norm_by_std: bool = True) -> np.ndarray:
    """(s - mean)/(std + 1e-6) within the group, std unbiased: DeepSeekMath, arXiv 2402.03300.

    Without `norm_by_std` only the mean is subtracted: Dr. GRPO, arXiv 2503.20783. A group of one
    keeps its score.
    """
    out = np.array(scores, np.float64)
    for members in _members(groups):
        if len(members) == 1:
            continue
        centred = out[members] - _mean(out[members])
        if norm_by_std:
            # Groups whose scores are all equal divide 0 by EPS: no advantage, and no division by 0.
            centred = centred / (out[members].std(ddof=1) + EPS)
        out[members] = centred
    return out


def rloo(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """s minus the mean of the group's others: leave-one-out REINFORCE, arXiv 2402.14740.

    A group of one keeps its score.
    """
    out = np.array(scores, np.float64)
    for members in _members(groups):
        n = len(members)
        if n > 1:
            # s - (n·mean - s)/(n - 1)
            out[members] = (out[members] - _mean(out[members])) * n / (n - 1)
    return out


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """The trajectories of each group, by their places."""
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def _mean(values: np.ndarray) -> float:
    """The mean, of equal numbers exactly that number: what rounding would leave of each, divided by
    an epsilon, would be an advantage.
    """
    low = float(values.min())
    return low if low == values.max() else float(values.mean())


# --- by token ---


def reinforce_plus_plus(token_rewards: PerToken, masks: PerToken, gamma: float = 1.0) -> Estimated:
    """Discounted returns over sampled tokens, whitened over the whole batch: arXiv 2501.03262,
    eq. 7-9.

    Tokens that weren't sampled are passed over: they neither discount nor carry a reward.
    """
    returns = []
    for rewards, mask in zip(token_rewards, masks, strict=True):
        running = 0.0
        out = np.zeros(len(rewards))
        # From the end: a token's return is its reward and what comes after it.
        for i in np.flatnonzero(mask)[::-1]:
            running = float(rewards[i]) + gamma * running
            out[i] = running
        returns.append(out)
    return whiten(returns, masks), returns


def reinforce_plus_plus_baseline(
    scores: np.ndarray, groups: np.ndarray, masks: PerToken
) -> list[np.ndarray]:
    """The group's mean subtracted, then whitened over all sampled tokens of the batch: arXiv
    2501.03262, section 3.3.
    """
    return whiten(spread(grpo(scores, groups, norm_by_std=False), masks), masks)


def whiten(values: PerToken, masks: PerToken) -> list[np.ndarray]:
    """(x - mean)/sqrt(var + 1e-8) over all sampled tokens of the batch; 0 elsewhere.

    The variance is unbiased.
    """
    sampled = [v[mask] for v, mask in zip(values, masks, strict=True)]
    chosen = np.concatenate(sampled) if sampled else np.zeros(0)
    mean = _mean(chosen) if len(chosen) else 0.0
    variance = chosen.var(ddof=1) if len(chosen) > 1 else 0.0
    scale = np.sqrt(variance + VARIANCE_EPS)
    return [np.where(mask, (v - mean) / scale, 0.0) for v, mask in zip(values, masks, strict=True)]


def spread(values: np.ndarray, masks: PerToken) -> list[np.ndarray]:
    """A number per trajectory as the same number on each of its sampled tokens, 0 elsewhere."""
    return [np.where(mask, value, 0.0) for value, mask in zip(values, masks, strict=True)]


def place_reward(reward: float, mask: np.ndarray) -> np.ndarray:
    """A trajectory's reward on its last sampled token; nowhere, where nothing was sampled."""
    out = np.zeros(len(mask))
    sampled = np.flatnonzero(mask)
    if len(sampled):
        out[sampled[-1]] = reward
    return out


def place_turn_rewards(
    given: Sequence[float],
    reward: float,
    mask: np.ndarray,
    joins: Sequence[int] = (),
) -> np.ndarray:
    """What each turn was `given` on its last sampled token, the rest of the trajectory's `reward`
    on the last of all. They add up to `reward`.

    A turn is a run of sampled tokens: the template stands between two of them, but where one begins
    at a place of `joins`. ValueError where there aren't as many as turns were given something.
    """
    if not given:
        return place_reward(reward, mask)
    # A sampled token that no sampled token follows ends a run, and so a turn.
    is_followed = np.append(mask[1:], False)
    is_followed[[join - 1 for join in joins]] = False
    ends = np.flatnonzero(mask & ~is_followed)
    if len(ends) != len(given):
        raise ValueError(
            f"{len(given)} turns of a trajectory were given rewards, and {len(ends)} were sampled: "
            "none can be put where it belongs. Leave out algorithm.credit_turns."
        )
    # `reward` has the turns' part already: placed whole it would count twice.
    out = place_reward(reward - sum(given), mask)
    out[ends] += given
    return out


# --- estimators ---


def estimate(estimator: Estimator, inputs: AdvantageInputs) -> Estimated:
    """(advantages, returns) per token. ValueError where a user's estimator gives anything else."""
    advantages, returns = estimator.function(inputs)
    for name, arrays in (("advantages", advantages), ("returns", returns)):
        lengths = [len(values) for values in arrays]
        wanted = [len(mask) for mask in inputs.masks]
        if lengths != wanted:
            raise ValueError(
                f"the advantage estimator gave {name} of {len(lengths)} trajectories, with "
                f"{sum(lengths)} tokens; there are {len(wanted)}, with {sum(wanted)}. Give an array "
                "over all tokens of each trajectory, 0 where `inputs.masks` is False."
            )
    return advantages, returns


def by_trajectory(values: np.ndarray, inputs: AdvantageInputs) -> Estimated:
    """A number per trajectory as the advantage and the return of each of its sampled tokens."""
    advantages = spread(values, inputs.masks)
    return advantages, advantages


def _grpo(inputs: AdvantageInputs) -> Estimated:
    return by_trajectory(grpo(inputs.scores, inputs.groups, inputs.norm_by_std), inputs)


def _rloo(inputs: AdvantageInputs) -> Estimated:
    return by_trajectory(rloo(inputs.scores, inputs.groups), inputs)


def _reinforce_plus_plus(inputs: AdvantageInputs) -> Estimated:
    return reinforce_plus_plus(inputs.token_rewards, inputs.masks, inputs.gamma)


def _reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> Estimated:
    made = reinforce_plus_plus_baseline(inputs.scores, inputs.groups, inputs.masks)
    return made, made


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(_grpo, compares_samples=True, reads_norm_by_std=True),
    "rloo": Estimator(_rloo, compares_samples=True),
    "reinforce_plus_plus": Estimator(_reinforce_plus_plus, reads_token_rewards=True),
    "reinforce_plus_plus_baseline": Estimator(_reinforce_plus_plus_baseline),
}
