"""How a run ends: it waits for its last save, closes its loggers, and prints its last lines."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from retool.checkpoint.format.folder import holds_export, holds_shards, model_folder
from retool.preflight.plan import RunReport
from retool.run.folder import say
from retool.run.saving import say_saved, watched
from retool.run.session import Progress, Session

PATIENCE_S = 120.0  # that an error waits for the save in flight: with a peer lost, it may never end


@contextmanager
def orderly_end(session: Session[RunReport], progress: Progress) -> Iterator[None]:
    """However the run ends, its loggers are closed.

    An error first waits for the save in flight, so that no checkpoint is lost.
    """
    try:
        yield
    except Exception:
        end = time.monotonic() + PATIENCE_S
        # Polled, not waited for: the save ends by an agreement of all ranks, and the error may have
        # lost one.
        while progress.save is not None and time.monotonic() < end:
            say_saved(session, progress, wait=False)
            time.sleep(0.02)
        if progress.save is None:
            session.staging.close()  # which waits for the copy to trainer.default_hdfs_dir, too
        raise
    finally:
        session.loggers.close()


def finish(session: Session[RunReport], progress: Progress) -> None:
    """Wait for the last save, say the last lines and part from the other processes.

    Collective. ValueError where the last step's checkpoint isn't there.
    """
    with watched(session):
        say_saved(session, progress, wait=True)
        if progress.step and progress.saved_step != progress.step:
            raise ValueError(
                f"step {progress.step} was trained, but its checkpoint could not be saved (see above). "
                "Mend that and run the same command again: it goes on from the newest checkpoint in "
                f"{session.folder}, and begins anew where there is none."
            )
        if not session.caller.quiet:
            say(session.mesh, last_words(session, progress.step))
            for line in what_is_there(session.folder, progress.step):
                say(session.mesh, line)
        if dist.is_initialized():
            dist.barrier()
            if session.caller.owns_process:
                dist.destroy_process_group()
            else:
                session.mesh.part()


def last_words(session: Session[RunReport], step: int) -> str:
    """Everything is done, or the run was asked to stop before."""
    folder = session.folder
    steps = session.report.steps
    if not session.report.options.saves:
        return f"validated step {step}: {folder}"
    if step < steps:
        return f"asked to stop at step {step:,} of {steps:,}: {folder}. The same command goes on from there."
    return f"finished at step {step:,} of {steps:,}: {folder}"


def what_is_there(folder: Path, step: int) -> list[str]:
    """Where the model of a run's last step is, and how to look at the run: a line each."""
    lines: list[str] = []
    shards = model_folder(folder / f"global_step_{step}")
    if holds_export(shards):
        lines.append(f"  the model, for transformers or the next stage: {shards / 'huggingface'}")
    elif holds_shards(shards, "model"):
        merged = shlex.join([str(shards), "--out", str(folder / "merged")])
        lines.append(f"  the model, for transformers: python -m retool.checkpoint merge {merged}")
    lines.append(f"  the run on one page: python -m retool.report {shlex.quote(str(folder))}")
    return lines
