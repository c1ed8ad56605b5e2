"""Updates that are skipped because their gradient norm isn't finite: a few are reported, many end
the run.
"""

from __future__ import annotations

import shlex

from retool.preflight.plan import RunReport
from retool.run.folder import say
from retool.run.session import Progress, Session


def count_update(
    session: Session[RunReport], progress: Progress, *, skipped: bool, norm: float, what: str
) -> None:
    """Count an update; ValueError where too many in a row were skipped.

    `what` names it: "step 12", "optimizer step 12".
    """
    skips = progress.skips
    if not skipped:
        skips.in_a_row = 0
        return
    skips.total += 1
    skips.in_a_row += 1
    say(session.mesh, f"{what} was skipped: its gradient norm is {norm}.")
    # In fp16 the first updates only bring the loss scale down, one halving each.
    allowed = session.report.options.trainer.max_grad_skips + session.optimizer.loss_scale.halvings
    if skips.in_a_row >= allowed:
        kind, _, number = what.rpartition(" ")
        raise ValueError(
            f"{skips.in_a_row} {kind}s in a row had a non-finite gradient norm (the last is {number}): "
            f"the run stops. {look_at_weights(session.report)}"
        )


def require_trained(session: Session[RunReport], progress: Progress, updates: int) -> None:
    """ValueError at the end of a run where none of its `updates` changed anything.

    Its checkpoint would pass for a trained model.
    """
    skipped = progress.skips.total
    if skipped < updates:
        return
    problem = progress.skips.without or "no step had anything to train on"
    if updates:
        problem = f"all {updates:,} updates had a gradient that isn't finite"
    raise ValueError(
        f"nothing was trained: {problem}, so there is nothing to save in {session.folder}. "
        f"{look_at_weights(session.report)}"
    )


def look_at_weights(report: RunReport) -> str:
    """A sentence that says how to find out whether the model that a run began with is sound."""
    command = f"python -m retool.checkpoint verify {shlex.quote(str(report.folder))}"
    return f"Look at the data and the learning rate; whether the model is sound says {command}"
