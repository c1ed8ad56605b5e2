"""Samples that say nothing about the policy: told while they are few, the run's end when they are
many.

All ranks see the same samples, so all of them warn and end alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from retool.rl.objective.filter import UnusableSamples
from retool.rl.state import TrainState
from retool.rl.types import FAILURE, TOOL_FAILURE, Scored

NO_ROOM = (
    "the engine's cache has no room for a sequence that long: raise "
    "actor_rollout_ref.rollout.gpu_memory_utilization or tensor_model_parallel_size, or lower "
    "data.max_response_length"
)


def require_scores(members: Sequence[Scored], most: float, where: str) -> None:
    """UnusableSamples with the first traceback where the reward failed on all of `members`, or on a
    larger share than `most`.

    `where` says what they are of: "step 3", "the validation after step 3".
    """
    members = [member for member in members if not member.lost]
    failed = [member for member in members if member.failure is not None]
    if not failed or (len(failed) < len(members) and len(failed) <= most * len(members)):
        return
    first = next((member for member in failed if member.trace), failed[0])
    said = first.trace or (
        f"{first.info.get(FAILURE, '')} (reward_model.timeout_seconds and reward_model.memory_mb are its "
        "limits)"
    )
    way_out = "Mend the reward function"
    if len(failed) < len(members):
        way_out += f", or raise reward_model.max_failed_share={most:g}"
    raise UnusableSamples(
        f"the reward function failed on {len(failed)} of the {len(members)} answers of {where}: "
        f"their scores would be the floor, and the policy would be trained on noise. {way_out}; the "
        f"same command then goes on from the last checkpoint. The first failure:\n{said}"
    )


def lost_to(members: Sequence[Scored]) -> str:
    """What the first lost sample was lost to; "" where none was."""
    first = next((member for member in members if member.lost), None)
    return "" if first is None else str(first.info.get(TOOL_FAILURE) or NO_ROOM)


def count_lost(state: TrainState, members: Sequence[Scored], most: float) -> None:
    """Note a step's samples that were lost, and whether they are more than the share `most`."""
    lost = sum(member.lost for member in members)
    state.lost_share = lost / max(len(members), 1)
    state.lost_to = lost_to(members)
    state.lost_in_a_row = state.lost_in_a_row + 1 if state.lost_share > most else 0


def require_infrastructure(state: TrainState, most: float, steps: int) -> None:
    """UnusableSamples with the cause where more than the share `most` was lost in each of the last
    `steps` steps.
    """
    if state.lost_in_a_row < steps:
        return
    raise UnusableSamples(
        f"{state.lost_share:.0%} of the samples of step {state.step} were lost, and more than "
        f"{most:.0%} in each of the last {steps} steps, to what isn't the policy's fault: "
        f"{state.lost_to}. Mend that; the same command then goes on from the last checkpoint. (The "
        "limits: actor_rollout_ref.rollout.max_lost_share and max_lost_steps.)"
    )


def warn_of_failures(members: Sequence[Scored]) -> None:
    """Why the first reward that failed did, and what the first lost sample was lost to: each reason
    is shown once a run.
    """
    reason = next(
        (member.info.get(FAILURE) for member in members if member.failure is not None), None
    )
    if reason is not None:
        warnings.warn(
            f"the reward function gave no score ({reason}); such an answer gets reward_model.floor.",
            stacklevel=1,
        )
    broken = lost_to(members)
    if broken:
        counted = "they are counted (stop/infrastructure, stop/aborted) and not trained on"
        warnings.warn(f"samples are lost ({broken}); {counted}.", stacklevel=1)
