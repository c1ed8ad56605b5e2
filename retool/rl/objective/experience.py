"""From a step's groups to the rows of its update: old and reference log-probabilities, KL in the
reward, advantages, correction.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from retool.batch import Sample
from retool.data.packing import Budget
from retool.parallel.fsdp import Sharded
from retool.rl.config import AlgorithmConfig
from retool.rl.metrics import advantage_metrics
from retool.rl.objective.advantages import estimate, place_reward
from retool.rl.objective.batching import Row
from retool.rl.objective.correction import correction_weights, gap_metrics, weight_metrics
from retool.rl.objective.losses import kl
from retool.rl.objective.policy import policy_logprobs
from retool.rl.types import Group


@dataclass(frozen=True)
class Experience:
    """A step's trajectories as the update sees them, on every rank alike. `groups` numbers each
    row's group; `kl` is the mean KL to the reference per token, where it is in the reward.
    """

    rows: list[Row]
    groups: list[int]
    metrics: dict[str, float]
    kl: float | None = None
    on_policy: bool = (
        False  # old log-probabilities were left out: they are those of the only update itself
    )
    # they are the sampler's, of the present weights: the first update can tell how far it is from
    # them
    compared: bool = False


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
    step: int,
    model: Sharded,
    reference: Sharded | None,
    algorithm: AlgorithmConfig,
    temperature: float,
    budget: Budget,
    kl_coef: float,
    times: dict[str, float],
    one_update: bool = False,
) -> Experience:
    """Collective. `step` is how many training steps the weights have seen: older trajectories keep
    their sampler's log-probabilities as the old ones, since no present weights sampled them.
    `one_update`: a single optimizer step will see these; where nothing else needs the old
    log-probabilities they aren't computed.
    """
    members = [member for group in groups for member in group.members]
    found = [member.trajectory for member in members]
    numbers = [i for i, group in enumerate(groups) for _ in group.members]
    masks = [t.mask for t in found]
    samples = [Sample(t.tokens, t.mask) for t in found]
    metrics: dict[str, float] = {}
    old = [t.logp for t in found]
    correction = algorithm.rollout_correction
    stale = any(t.policy_version != step for t in found)
    needed = algorithm.use_kl_in_reward or correction.rollout_is or stale
    on_policy = one_update and not needed and not correction.bypass_mode
    if not correction.bypass_mode and not on_policy:
        with timed(times, "old_log_prob"):
            present, entropies = policy_logprobs(model, samples, temperature, budget, entropy=True)
        fresh = [t.policy_version == step for t in found]
        old = [p if new else t.logp for p, t, new in zip(present, found, fresh, strict=True)]
        chosen = [i for i, new in enumerate(fresh) if new]
        metrics |= (
            gap_metrics(
                [found[i].logp for i in chosen],
                [present[i] for i in chosen],
                [masks[i] for i in chosen],
            )
            if chosen
            else {}
        )
        metrics["actor/entropy"] = _mean(entropies, masks)
    ref = None
    if reference is not None:
        with timed(times, "ref"):
            ref, _ = policy_logprobs(reference, samples, temperature, budget)
    with timed(times, "adv"):
        rewards = [
            place_reward(member.reward, mask) for member, mask in zip(members, masks, strict=True)
        ]
        divergence = None
        if algorithm.use_kl_in_reward and ref is not None:
            penalties = [
                kl(torch.from_numpy(o), torch.from_numpy(r), algorithm.kl_penalty).numpy()
                for o, r in zip(old, ref, strict=True)
            ]
            rewards = [
                r - np.where(m, kl_coef * p, 0.0)
                for r, m, p in zip(rewards, masks, penalties, strict=True)
            ]
            divergence = _mean(penalties, masks)
            metrics |= {
                "actor/reward_kl_penalty": divergence,
                "actor/reward_kl_penalty_coeff": kl_coef,
            }
        advantages, returns = estimate(
            algorithm.adv_estimator,
            rewards,
            masks,
            np.array(numbers),
            algorithm.norm_adv_by_std_in_grpo,
            algorithm.gamma,
        )
        metrics |= advantage_metrics(advantages, returns, masks)
        behaviour = [t.logp_behaviour for t in found]
        weights = correction_weights(
            old, behaviour, masks, correction.rollout_is, correction.rollout_is_threshold
        )
        if correction.rollout_is:
            metrics |= weight_metrics(weights, masks, correction.rollout_is_threshold)
    refs = ref if ref is not None else [None] * len(found)
    rows = [
        Row(t.tokens, t.mask, o, a, w, r)
        for t, o, a, w, r in zip(found, old, advantages, weights, refs, strict=True)
    ]
    return Experience(
        rows, numbers, metrics, divergence, on_policy, correction.bypass_mode and not stale
    )


def _mean(values: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """Mean over sampled tokens; 0 where there are none."""
    count = sum(int(mask.sum()) for mask in masks)
    return float(sum(v[m].sum(dtype=np.float64) for v, m in zip(values, masks, strict=True))) / max(
        count, 1
    )
