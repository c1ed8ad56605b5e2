"""Trajectories as the sequences that a model is given: several, where a loop cut its context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retool.batch import Sample
from retool.data.packing import Budget
from retool.parallel.fsdp import Sharded
from retool.rl.objective.policy import policy_logprobs
from retool.rl.types import Trajectory

PerToken = list[np.ndarray]  # one array per trajectory, over all of its tokens


def trajectory_logprobs(
    model: Sharded,
    trajectories: Sequence[Trajectory],
    temperature: float,
    budget: Budget,
    replayed: bool = False,
    entropy: bool = False,
) -> tuple[PerToken, PerToken]:
    """(log p, entropy) of what was sampled, as `policy_logprobs` gives them, by trajectory.

    `replayed`: each token goes through the experts that computed it when it was sampled. Collective.
    """
    samples = [sample for trajectory in trajectories for sample in samples_of(trajectory, replayed)]
    logp, entropies = policy_logprobs(model, samples, temperature, budget, entropy)
    return joined(logp, trajectories), joined(entropies, trajectories)


def samples_of(trajectory: Trajectory, replayed: bool) -> list[Sample]:
    """The trajectory's sequences, in order."""
    experts = trajectory.experts if replayed else None
    if not trajectory.cuts:
        return [Sample(trajectory.tokens, trajectory.mask, experts)]
    return [
        Sample(
            trajectory.tokens[span],
            trajectory.mask[span],
            None if experts is None else experts[span],
        )
        for span in trajectory.spans
    ]


def joined(values: Sequence[np.ndarray], trajectories: Sequence[Trajectory]) -> PerToken:
    """An array for each trajectory, of one for each sequence."""
    rest = iter(values)
    out = []
    for trajectory in trajectories:
        parts = [next(rest) for _ in trajectory.spans]
        out.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
    return out
