"""Samples that say nothing about the policy: told while they are few, the run's end when they are many.

All ranks see the same samples, so all of them warn and end alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from retool.rl.filter import UnusableSamples
from retool.rl.types import FAILURE, TOOL_FAILURE, Scored


def require_scores(members: Sequence[Scored], most: float, where: str) -> None:
    """UnusableSamples with the first traceback where the reward failed on all of `members`, or on a larger share than `most`.

    `where` says what they are of: "step 3", "the validation after step 3".
    """
    failed = [member for member in members if member.failure is not None]
    if not failed or (len(failed) < len(members) and len(failed) <= most * len(members)):
        return
    first = next((member for member in failed if member.trace), failed[0])
    said = first.trace or f"{first.info.get(FAILURE, '')} (reward_model.timeout_seconds and reward_model.memory_mb are its limits)"
    way_out = "Mend the reward function"
    if len(failed) < len(members):
        way_out += f", or raise reward_model.max_failed_share={most:g}"
    raise UnusableSamples(
        f"the reward function failed on {len(failed)} of the {len(members)} answers of {where}: their scores would be the floor, and the "
        f"policy would be trained on noise. {way_out}; the same command then goes on from the last checkpoint. The first failure:\n{said}"
    )


def warn_of_failures(members: Sequence[Scored]) -> None:
    """Why the first reward that failed did, and the first tool: each reason is shown once a run."""
    reason = next((member.info.get(FAILURE) for member in members if member.failure is not None), None)
    if reason is not None:
        warnings.warn(f"the reward function gave no score ({reason}); such an answer gets reward_model.floor.", stacklevel=1)
    broken = next((member.info[TOOL_FAILURE] for member in members if TOOL_FAILURE in member.info), None)
    if broken is not None:
        warnings.warn(f"a tool broke ({broken}); such an answer ends there (tool_error) and is judged as it is.", stacklevel=1)
