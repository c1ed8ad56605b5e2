"""From a step's groups to the rows of its update.

In order: old log-probabilities, those of the reference, rewards by token (with the KL), advantages,
the sampler's correction; then one row per trajectory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from retool.data.packing import Budget
from retool.parallel.fsdp import Sharded
from retool.rl.config.algorithm import AlgorithmConfig
from retool.rl.metrics import advantage_metrics, spread_of
from retool.rl.objective.advantages import (
    AdvantageInputs,
    Estimator,
    estimate,
    place_reward,
    place_turn_rewards,
)
from retool.rl.objective.batching import Row
from retool.rl.objective.correction import correction_weights, gap_metrics, weight_metrics
from retool.rl.objective.losses import kl
from retool.rl.objective.sequences import PerToken, trajectory_logprobs
from retool.rl.types import Group, Scored, Trajectory

# Of a step, to tell what replaying the sampler's experts changes: another forward of all would cost
# a quarter of the update
TRAJECTORIES_TO_COMPARE = 32


@dataclass(frozen=True)
class Experience:
    """A step's trajectories as the update sees them, on every rank alike.

    `groups` numbers each row's group. `trained` are the places of the rows that the update sees:
    all but the truncated ones, where these are masked. `kl` is the mean KL to the reference per token, where it is
    in the reward. `on_policy` and `compared` are as in `policy.LossSpec`, for the first update.
    """

    rows: list[Row]
    groups: list[int]
    trained: list[int]
    metrics: dict[str, float]
    kl: float | None = None
    on_policy: bool = False
    compared: bool = False


@dataclass(frozen=True)
class ExperienceOptions:
    """How experience is made of groups.

    `step` is how many training steps the weights have seen: only trajectories of that version were
    sampled by the present ones. `one_update`: a single optimizer step will see all of them.
    `kl_coef` weighs the KL in the reward. `turn_weight` is how much of what a turn was given is in
    the reward; 0: all of a reward stands at the trajectory's end.
    """

    algorithm: AlgorithmConfig
    estimator: Estimator
    temperature: float
    budget: Budget
    step: int
    kl_coef: float = 0.0
    one_update: bool = False
    turn_weight: float = 0.0


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of what is inside to times[name]."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        times[name] = times.get(name, 0.0) + time.perf_counter() - begin


def make_experience(
    groups: Sequence[Group],
    model: Sharded,
    reference: Sharded | None,
    options: ExperienceOptions,
    times: dict[str, float],
) -> Experience:
    """The experience that the update of `model` learns from. Collective, and the same on every
    rank.

    `reference` is there where the loss or the reward has a KL to it. Seconds are added to `times`.
    """
    members = [member for group in groups for member in group.members]
    trajectories = [member.trajectory for member in members]
    numbers = [i for i, group in enumerate(groups) for _ in group.members]
    # The order matters. The KL in the reward needs the old log-probabilities, advantages need the
    # rewards, and the correction compares the old ones with the sampler's.
    old = _old_logprobs(trajectories, model, options, times)
    unreplayed = _gap_without_replay(trajectories, model, options, times)
    ref = None
    if reference is not None:
        with timed(times, "ref"):
            ref, _ = trajectory_logprobs(
                reference, trajectories, options.temperature, options.budget
            )
    with timed(times, "adv"):
        rewards = _token_rewards(members, old.logp, ref, options)
        inputs = AdvantageInputs(
            rewards.values,
            [trajectory.mask for trajectory in trajectories],
            np.array(numbers),
            options.algorithm.norm_adv_by_std_in_grpo,
            options.algorithm.gamma,
        )
        advantages, returns = estimate(options.estimator, inputs)
        weights, weights_said = _correction(trajectories, old.logp, options.algorithm)
    # Truncated ones were compared with: only the update doesn't see them
    masked = options.algorithm.mask_truncated
    trained = [i for i, t in enumerate(trajectories) if not (masked and t.truncated)]
    metrics = {
        **old.metrics,
        **rewards.metrics,
        **advantage_metrics(
            [advantages[i] for i in trained],
            [returns[i] for i in trained],
            [inputs.masks[i] for i in trained],
        ),
        **weights_said,
        **unreplayed,
    }
    if masked:
        metrics["mask/truncated"] = len(trajectories) - len(trained)
    rows = [
        Row(
            trajectory.tokens,
            trajectory.mask,
            old=old.logp[i],
            sampler=trajectory.logp,
            advantage=advantages[i],
            correction=weights[i],
            ref=None if ref is None else ref[i],
            experts=trajectory.experts,
            cuts=trajectory.cuts,
        )
        for i, trajectory in enumerate(trajectories)
    ]
    return Experience(rows, numbers, trained, metrics, rewards.kl, old.on_policy, old.compared)


# --- old log-probabilities ---


@dataclass(frozen=True)
class _Old:
    """Log-probabilities before the step's first update, and whose they are."""

    logp: PerToken
    metrics: dict[str, float] = field(default_factory=dict)
    on_policy: bool = False
    compared: bool = False


def _old_logprobs(
    trajectories: Sequence[Trajectory],
    model: Sharded,
    options: ExperienceOptions,
    times: dict[str, float],
) -> _Old:
    """The sampler's own, where asked for or where the update needs none; else a forward pass of
    the present weights tells.

    Trajectories of older weights keep their sampler's: no present weights sampled them.
    """
    # Three cases, the cheapest first: take the sampler's numbers as they are, let the update find
    # them by itself, or spend a forward pass.
    algorithm = options.algorithm
    sampler = [trajectory.logp for trajectory in trajectories]
    is_fresh = [trajectory.policy_version == options.step for trajectory in trajectories]
    if algorithm.rollout_correction.bypass_mode:
        # The distance to older weights is none between two kernels, and isn't measured.
        return _Old(sampler, compared=all(is_fresh))
    read_before_the_update = algorithm.use_kl_in_reward or algorithm.rollout_correction.rollout_is
    # The only update starts from the weights that sampled: the loss finds these numbers by itself
    if options.one_update and all(is_fresh) and not read_before_the_update:
        return _Old(sampler, on_policy=True)
    with timed(times, "old_log_prob"):
        present, entropies = trajectory_logprobs(
            model,
            trajectories,
            options.temperature,
            options.budget,
            replayed=True,
            entropy=True,
        )
    masks = [trajectory.mask for trajectory in trajectories]
    fresh = [i for i, new in enumerate(is_fresh) if new]
    metrics = {}
    if fresh:
        metrics = gap_metrics(
            [sampler[i] for i in fresh], [present[i] for i in fresh], [masks[i] for i in fresh]
        )
    metrics["actor/entropy"] = _mean(entropies, masks)
    logp = [present[i] if new else sampler[i] for i, new in enumerate(is_fresh)]
    return _Old(logp, metrics)


def _gap_without_replay(
    trajectories: Sequence[Trajectory],
    model: Sharded,
    options: ExperienceOptions,
    times: dict[str, float],
) -> dict[str, float]:
    """How far the sampler would be from the trainer if the router chose anew, of the step's first
    trajectories; empty where nothing is replayed. Collective.
    """
    some = [t for t in trajectories if t.experts is not None]
    some = some[:TRAJECTORIES_TO_COMPARE]
    if not some:
        return {}
    with timed(times, "old_log_prob"):
        logp, _ = trajectory_logprobs(model, some, options.temperature, options.budget)
    told = gap_metrics([t.logp for t in some], logp, [t.mask for t in some])
    return {
        f"router/{name}_without_replay": told[f"training/rollout_{name}"]
        for name in ("logp_diff_mean", "logp_diff_max")
    }


# --- rewards by token ---


@dataclass(frozen=True)
class _TokenRewards:
    values: PerToken
    metrics: dict[str, float] = field(default_factory=dict)
    kl: float | None = None


def _token_rewards(
    members: Sequence[Scored], old: PerToken, ref: PerToken | None, options: ExperienceOptions
) -> _TokenRewards:
    """Each reward on its trajectory's last sampled token, or what its turns were given on theirs;
    less the KL on each token, where asked for.
    """
    masks = [member.trajectory.mask for member in members]
    rewards = [_placed(member, options.turn_weight) for member in members]
    if not options.algorithm.use_kl_in_reward or ref is None:
        return _TokenRewards(rewards)
    kind = options.algorithm.kl_penalty
    penalties = [
        kl(torch.from_numpy(mine), torch.from_numpy(theirs), kind).numpy()
        for mine, theirs in zip(old, ref, strict=True)
    ]
    values = [
        # On each sampled token, not as a sum at the end: estimators that read rewards by token then
        # know where the policy strayed.
        reward - np.where(mask, options.kl_coef * penalty, 0.0)
        for reward, mask, penalty in zip(rewards, masks, penalties, strict=True)
    ]
    mean = _mean(penalties, masks)
    # These are the rewards that are trained on: `score_metrics` knows of no KL.
    sums = [value[mask].sum() for value, mask in zip(values, masks, strict=True)]
    metrics = {
        "actor/reward_kl_penalty": mean,
        "actor/reward_kl_penalty_coeff": options.kl_coef,
        **spread_of("critic/rewards", sums),
    }
    return _TokenRewards(values, metrics, mean)


def _placed(
    member: Scored,
    turn_weight: float,
) -> np.ndarray:
    """The reward of a trajectory, token by token."""
    trajectory = member.trajectory
    if not turn_weight:
        return place_reward(member.reward, trajectory.mask)
    given = [turn_weight * reward for reward in trajectory.turn_rewards]
    return place_turn_rewards(given, member.reward, trajectory.mask, trajectory.joins)


# --- the sampler's correction ---


def _correction(
    trajectories: Sequence[Trajectory], old: PerToken, algorithm: AlgorithmConfig
) -> tuple[PerToken, dict[str, float]]:
    """Importance weights of the sampler, 1 where none are asked for, and what they are like."""
    wanted = algorithm.rollout_correction
    masks = [trajectory.mask for trajectory in trajectories]
    behaviour = [trajectory.logp_behaviour for trajectory in trajectories]
    weights = correction_weights(
        old, behaviour, masks, wanted.rollout_is, wanted.rollout_is_threshold
    )
    if wanted.rollout_is is None:
        return weights, {}
    return weights, weight_metrics(weights, masks, wanted.rollout_is_threshold)


def _mean(values: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """Mean over sampled tokens; 0 where there are none."""
    count = sum(int(mask.sum()) for mask in masks)
    total = sum(v[mask].sum(dtype=np.float64) for v, mask in zip(values, masks, strict=True))
    return float(total) / max(count, 1)
