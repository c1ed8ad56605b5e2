"""Samples that failed for reasons other than the policy: a few are reported, many end the run.

All ranks see the same samples, so all of them warn and end alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from retool.rl.objective.filter import UnusableSamples
from retool.rl.reward.protocol import BUDGET_SPENT
from retool.rl.state import TrainState
from retool.rl.types import FAILURE, TOOL_FAILURE, Scored

NO_ROOM = (
    "the engine's cache has no room for a sequence that long: raise "
    "actor_rollout_ref.rollout.gpu_memory_utilization or tensor_model_parallel_size, or lower "
    "data.max_response_length"
)
LIMITS_OF_REWARD = "(reward_model.timeout_seconds and reward_model.memory_mb are its limits)"


def require_scores(members: Sequence[Scored], max_failed_share: float, where: str) -> None:
    """End the run where the reward failed on all of `members`, or on too large a share of them.

    `where` says what they are of: "step 3", "the validation after step 3". Raises UnusableSamples
    with the first traceback. A judge's budget that is spent ends it at once.
    """
    # Without this check a spent budget would look like a reward function that fails on every
    # answer.
    spent = next((member for member in members if member.failure == BUDGET_SPENT), None)
    if spent is not None:
        raise UnusableSamples(
            f"{spent.info[FAILURE]} ({where}). Raise it and start the same command, which goes on "
            "from the last checkpoint; or have what isn't judged left out of training: "
            "reward_model.judge.when_spent=mask."
        )
    judged = [member for member in members if not member.lost]
    failed = [member for member in judged if member.failure is not None]
    if not failed:
        return
    all_failed = len(failed) == len(judged)
    if not all_failed and len(failed) <= max_failed_share * len(judged):
        return
    way_out = "Mend the reward function"
    if not all_failed:
        way_out += f", or raise reward_model.max_failed_share={max_failed_share:g}"
    # A worker that was killed leaves no traceback: one that tells what went wrong is preferred.
    first = next((member for member in failed if member.trace), failed[0])
    told = first.trace or f"{first.info.get(FAILURE, '')} {LIMITS_OF_REWARD}"
    raise UnusableSamples(
        f"the reward function failed on {len(failed)} of the {len(judged)} answers of {where}: "
        f"their scores would be the floor, and the policy would be trained on noise. {way_out}; the "
        f"same command then goes on from the last checkpoint. The first failure:\n{told}"
    )


def cause_of_loss(members: Sequence[Scored]) -> str:
    """The cause by which the first lost sample was lost; "" if none was."""
    for member in members:
        if member.lost:
            return str(member.info.get(TOOL_FAILURE) or NO_ROOM)
    return ""


def count_lost(state: TrainState, members: Sequence[Scored], max_lost_share: float) -> None:
    """Note how many of a step's samples were lost, and for how many steps that were too many."""
    lost = sum(member.lost for member in members)
    state.lost_share = lost / max(len(members), 1)
    state.lost_to = cause_of_loss(members)
    if lost == len(members):
        state.skips.without = f"all samples of a step were lost ({state.lost_to})"
    too_many = state.lost_share > max_lost_share
    state.lost_in_a_row = state.lost_in_a_row + 1 if too_many else 0


def require_infrastructure(state: TrainState, max_lost_share: float, max_lost_steps: int) -> None:
    """End the run where too many samples were lost in each of the last `max_lost_steps` steps.

    Raises UnusableSamples with the cause.
    """
    if state.lost_in_a_row < max_lost_steps:
        return
    raise UnusableSamples(
        f"{state.lost_share:.0%} of the samples of step {state.step} were lost, and more than "
        f"{max_lost_share:.0%} in each of the last {max_lost_steps} steps, to what isn't the "
        f"policy's fault: {state.lost_to}. Mend that; the same command then goes on from the last "
        "checkpoint. (The limits: actor_rollout_ref.rollout.max_lost_share and max_lost_steps.)"
    )


def warn_of_failures(members: Sequence[Scored]) -> None:
    """Warn of the first reward that failed, with its cause, and of what the first lost sample was
    lost to.

    Python shows each reason once a run.
    """
    failed = next((member for member in members if member.failure is not None), None)
    if failed is not None:
        reason = failed.info.get(FAILURE)
        warnings.warn(
            f"the reward function gave no score ({reason}); such an answer gets reward_model.floor.",
            stacklevel=1,
        )
    cause = cause_of_loss(members)
    if cause:
        counted = "they are counted (stop/infrastructure, stop/aborted) and not trained on"
        warnings.warn(f"samples are lost ({cause}); {counted}.", stacklevel=1)
