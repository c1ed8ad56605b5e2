"""Writing a run's checkpoints, and reporting how each save ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from retool import checkpoint
from retool.checkpoint.flat.state import require_finite
from retool.model.costs import parameter_count
from retool.preflight.plan import RunReport, checkpoint_bytes
from retool.run.folder import say
from retool.run.resume import model_state
from retool.run.session import Progress, Session
from retool.run.skips import look_at_weights, require_trained

SLOWEST_MB_S = 5  # of a disk, to a rank, that a run still waits for
SLOWER = 4  # times that a save may take as long as the slowest before it


def save_step(
    session: Session[RunReport],
    progress: Progress,
    *,
    updates: int,
    data_state: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Write a checkpoint of this step, unless it has one; first say how the one before ended.

    `updates` counts the run's optimizer steps, `data_state` says where it is in its data, the same
    on every rank, and `extra` is this rank's own. Collective. ValueError where the weights aren't
    finite, and at the end of a run that trained nothing.
    """
    if progress.saved_step == progress.step:
        return
    report = session.report
    # Only at the end: a run may well begin with updates that are skipped, and save on the way.
    if progress.step == report.steps:
        require_trained(session, progress, updates)
    with watched(session):
        # One save at a time: the next one would write into the memory that this one still reads
        # from.
        say_saved(session, progress, wait=True)
        _require_finite_weights(session, progress.step)
        state = model_state(session.model, session.optimizer)
        training = checkpoint.TrainingState(
            step=progress.step,
            extra={**extra, **session.optimizer.loss_scale.state()},
            data_state={**data_state, "run": report.record},
        )
        progress.save = checkpoint.save(
            session.folder,
            replace(state, hyperparameters=_hyperparameters(session)),
            session.mesh,
            training,
            model_folder=report.folder or "",
            options=session.save_options,
            staging=session.staging,
        )
    # Set as soon as the save is under way; `say_saved` takes it back if it fails.
    progress.saved_step = progress.step


def _require_finite_weights(session: Session[RunReport], step: int) -> None:
    require_finite(
        session.model.layout,
        session.mesh,
        session.model.master,
        f"step {step} isn't saved",
        f"The run ends, and older checkpoints stay. {look_at_weights(session.report)}",
    )


def _hyperparameters(session: Session[RunReport]) -> dict[str, Any]:
    """The optimizer's settings, as torch keeps them beside its state."""
    adamw = session.optimizer.options
    return {
        "lr": session.report.options.optim.lr,
        "betas": list(adamw.betas),
        "eps": adamw.eps,
        "weight_decay": adamw.weight_decay,
    }


def say_saved(session: Session[RunReport], progress: Progress, wait: bool) -> None:
    """Say how the last save ended, once it has (`wait`: when it has).

    A failed one is loud, is no saved step, and the run goes on.
    """
    if progress.save is None:
        return
    result = progress.save.wait() if wait else progress.save.poll()
    if result is None:
        return
    progress.save = None
    if result.error is not None:  # which the save itself has said
        # So that the next chance to save isn't passed over.
        progress.saved_step = -1
        return
    staging = session.staging
    staging.slowest_s = max(staging.slowest_s or 0.0, result.seconds)
    rate = result.bytes / max(result.seconds, 1e-9) / 1e6
    took = (
        f"{result.stall_s:.2f} s of waiting, {result.seconds:.1f} s in all, {rate:.0f} MB/s a rank"
    )
    if not session.caller.quiet:
        say(session.mesh, f"saved {result.folder} ({took})")


# --- how long a save may take ---


@contextmanager
def watched(session: Session[RunReport]) -> Iterator[None]:
    """Around a save: a hang in it ends the run, after a time that size and disk allow it."""
    limit, why = save_limit(session)
    with session.watchdog.saving(limit, why):
        yield


def save_limit(session: Session[RunReport]) -> tuple[float, str]:
    """(seconds that a save may take, why): from the slowest one so far, or at first from its size."""
    options = session.report.options
    patience = options.trainer.watchdog_s
    slowest = session.staging.slowest_s
    if slowest is not None:
        why = f"trainer.watchdog_s and {SLOWER} times the {slowest:.1f} s of the slowest"
        return patience + SLOWER * slowest, why
    megabytes = bytes_of_first_rank(session) / 1e6
    why = f"trainer.watchdog_s and {megabytes:,.0f} MB at {SLOWEST_MB_S} MB/s, as none was measured yet"
    return patience + megabytes / SLOWEST_MB_S, why


def bytes_of_first_rank(session: Session[RunReport]) -> float:
    """What the first rank writes: its share, and alone the model that others can load."""
    report = session.report
    export = 0.0
    if report.model is not None and "hf_model" in report.options.checkpoint.save_contents:
        export = 2.0 * parameter_count(report.model)
    return export + (checkpoint_bytes(report) - export) / session.mesh.world
