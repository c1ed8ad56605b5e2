"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): groups whose samples all score the same
have no gradient.

Groups with a signal that a step doesn't need are kept for the next one; one that is older than that
is waste, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retool.rl.types import FAILURE, Group, Scored

MAX_STEPS_KEPT = 1  # training steps that a group may wait for the one that it is trained in
# Metrics that are there whatever the reward function returns, by their fields
OURS = {
    "score": "score",
    "reward": "reward",
    "seq_reward": "score",
    "seq_final_reward": "reward",
    "acc": "accuracy",
}


class UnusableSamples(ValueError):
    """What was sampled can't be trained on. All ranks see the same samples: they raise it alike."""


def value_of(member: Scored, metric: str) -> float:
    """A member's value of the metric: one of ours, or a number that the reward function returned.

    `acc` is `Scored.accuracy`. Where the reward function failed there is only the score. Raises
    UnusableSamples where there is no such number.
    """
    if metric in OURS:
        return float(getattr(member, OURS[metric]))
    if FAILURE in member.info:
        return float(member.score)
    value = member.info.get(metric)
    if isinstance(value, (int, float)):
        return float(value)
    raise UnusableSamples(
        f"algorithm.filter_groups.metric={metric}: the reward function gives no such number; it "
        f"gives {', '.join(metrics_of(member))}."
    )


def metrics_of(member: Scored) -> list[str]:
    """The names that a member has a value of."""
    told = [key for key, entry in member.info.items() if isinstance(entry, (int, float))]
    return sorted({*OURS, *told})


def has_signal(group: Group, metric: str) -> bool:
    """Whether the metric differs among the group's samples.

    Compared, not by a deviation: rounding gives equal numbers one.
    """
    values = [value_of(member, metric) for member in group.sound]
    return bool(values) and max(values) > min(values)


@dataclass(frozen=True)
class Collection:
    """The groups of a step while it is being sampled.

    `rounds` of sampling gave `sampled` groups, of which `no_signal` were left out; `reused` were
    kept by the step before, `expired` kept for too long. `total` is the sum of the groups' means of
    the metric, those without a signal too; `measured` of them had one: not all of their members
    were lost.
    """

    groups: tuple[Group, ...] = ()
    rounds: int = 0
    sampled: int = 0
    no_signal: int = 0
    expired: int = 0
    reused: int = 0
    total: float = 0.0
    measured: int = 0

    def metrics(self, kept: int) -> dict[str, float]:
        """What became of the groups; `kept` go on to the next step.

        There is no mean of the metric where nothing was measured: in a step whose groups are all left
        over from the step before, for one.
        """
        counts: dict[str, float] = {
            "filter/gen_batches": self.rounds,
            "filter/groups_sampled": self.sampled,
            "filter/groups_no_signal": self.no_signal,
            "filter/groups_expired": self.expired,
            "filter/groups_reused": self.reused,
            "filter/groups_kept": kept,
        }
        if not self.measured:
            return counts
        return counts | {"filter/metric_mean": self.total / self.measured}


def begin(kept: Sequence[Group], step: int) -> Collection:
    """Start step `step` (steps done so far) with the groups that the step before kept, those that
    are too old left out.
    """
    fresh = tuple(group for group in kept if step - group.policy_version <= MAX_STEPS_KEPT)
    return Collection(groups=fresh, expired=len(kept) - len(fresh), reused=len(fresh))


def add(collection: Collection, fresh: Sequence[Group], metric: str | None) -> Collection:
    """Add a round of sampling; with a `metric` only groups with a signal."""
    good = list(fresh)
    means = []
    if metric is not None:
        good = [group for group in fresh if has_signal(group, metric)]
        sound = [group.sound for group in fresh if group.sound]
        # Over groups without a signal, too: the mean of those that are trained alone would hide how
        # easy or hard the questions are.
        means = [np.mean([value_of(member, metric) for member in members]) for members in sound]
    return replace(
        collection,
        groups=(*collection.groups, *good),
        rounds=collection.rounds + 1,
        sampled=collection.sampled + len(fresh),
        no_signal=collection.no_signal + len(fresh) - len(good),
        total=collection.total + float(sum(means)),
        measured=collection.measured + len(means),
    )


def complete(collection: Collection, wanted: int, most_rounds: int) -> bool:
    """Whether sampling ends: the batch is full, or `most_rounds` (0: no limit) are spent."""
    is_full = len(collection.groups) >= wanted
    is_spent = most_rounds > 0 and collection.rounds >= most_rounds
    return is_full or is_spent


def take(collection: Collection, wanted: int, keeps: bool) -> tuple[list[Group], list[Group]]:
    """(the step's batch, what is kept for the next): the oldest first.

    A run `keeps` nothing without dynamic sampling. What one with it had kept would otherwise have a
    fresh group wait in its place, in every step.
    """
    surplus = collection.groups[wanted:] if keeps else ()
    return list(collection.groups[:wanted]), list(surplus)
