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

OLDEST = 1  # training steps that a kept group may lie


class UnusableSamples(ValueError):
    """What was sampled can't be trained on. All ranks see the same samples: they raise it alike."""


def value_of(member: Scored, metric: str) -> float:
    """A member's metric: score, reward, acc (`Scored.accuracy`), or a number of the reward
    function's own; the score where it failed.
    """
    score = member.score
    reward = member.reward
    own = {
        "score": score,
        "reward": reward,
        "seq_reward": score,
        "seq_final_reward": reward,
        "acc": member.accuracy,
    }
    value = own.get(metric, member.score if FAILURE in member.info else member.info.get(metric))
    if not isinstance(value, (int, float)):
        known = sorted(
            {*own, *(key for key, entry in member.info.items() if isinstance(entry, (int, float)))}
        )
        raise UnusableSamples(
            f"algorithm.filter_groups.metric={metric}: the reward function gives no such number; it "
            f"gives {', '.join(known)}."
        )
    return float(value)


def has_signal(group: Group, metric: str) -> bool:
    """Whether the metric differs among the group's samples.

    Compared, not by a deviation: rounding gives equal numbers one.
    """
    values = [value_of(member, metric) for member in group.sound]
    return bool(values) and max(values) > min(values)


@dataclass(frozen=True)
class Collection:
    """The groups of a step while it is being sampled. `total` is the sum of the groups' means of
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
        """What became of the groups; `kept` go on to the next step."""
        return {
            "filter/gen_batches": self.rounds,
            "filter/groups_sampled": self.sampled,
            "filter/groups_no_signal": self.no_signal,
            "filter/groups_expired": self.expired,
            "filter/groups_reused": self.reused,
            "filter/groups_kept": kept,
            "filter/metric_mean": self.total / max(self.measured, 1),
        }


def begin(kept: Sequence[Group], step: int) -> Collection:
    """Start step `step` (steps done so far) with the groups that the step before kept, those that
    are too old left out.
    """
    fresh = tuple(group for group in kept if step - group.policy_version <= OLDEST)
    return Collection(groups=fresh, expired=len(kept) - len(fresh), reused=len(fresh))


def add(collection: Collection, fresh: Sequence[Group], metric: str | None) -> Collection:
    """Add a round of sampling; with a `metric` only groups with a signal."""
    good = [group for group in fresh if metric is None or has_signal(group, metric)]
    sound = [group.sound for group in fresh if group.sound] if metric is not None else []
    means = [np.mean([value_of(member, metric or "") for member in members]) for members in sound]
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
    return len(collection.groups) >= wanted or (
        most_rounds > 0 and collection.rounds >= most_rounds
    )


def take(collection: Collection, wanted: int) -> tuple[list[Group], list[Group]]:
    """(the step's batch, what is kept for the next): the oldest first."""
    return list(collection.groups[:wanted]), list(collection.groups[wanted:])
