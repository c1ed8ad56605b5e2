"""Resuming from a checkpoint, once there is a process group. Every function here is collective.

Preflight has looked at the checkpoint before (`retool.preflight.resume`); what it says of it is
asked again only where another one is taken after all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from retool import checkpoint
from retool.checkpoint.format.tracker import STEP, candidates, tracked
from retool.optim import AdamW
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh
from retool.preflight.plan import RunReport
from retool.preflight.resume import check_checkpoint, with_checkpoint
from retool.run.folder import say

R = TypeVar("R", bound=RunReport)


def to_resume(report: R, mesh: Mesh) -> R:
    """The report with the checkpoint to go on from, the same on every rank.

    The run before may have been ending while this one read its data: what it saved last is taken.
    ValueError where that can't be.
    """
    # Rank 0 looks: a shared disk may show the others an older listing.
    newest = _from_first_rank(_newest(report) if mesh.rank == 0 else None, mesh)
    return report if newest == report.resume else _with_other(report, newest)


def _newest(report: RunReport) -> Path | None:
    """The checkpoint to go on from now, which is seldom another than preflight found."""
    trainer = report.options.trainer
    known = report.resume
    if trainer.resume_mode != "auto":
        return known
    named = tracked(Path(trainer.default_local_dir))
    match = None if known is None else STEP.match(known.name)
    if named is None and known is None:
        return None
    # The usual case, for which nothing but the tracker file is read.
    if match is not None and named == int(match[1]):
        return known
    return checkpoint.latest(Path(trainer.default_local_dir), trainer.resume_fallback)


def resume(
    report: RunReport, mesh: Mesh, model: Sharded, optimizer: AdamW
) -> checkpoint.Loaded | None:
    """Fill model and optimizer from the checkpoint to go on from; None where the run begins."""
    if report.resume is None:
        return None
    found, loaded = load_checkpoint(report, mesh, model_state(model, optimizer))
    # In place: the optimizer's kernels hold this tensor.
    optimizer.steps.fill_(loaded.optimizer_step)
    optimizer.loss_scale.restore(loaded.extra)
    # The master weights were filled; what the forward computes with is a copy of them.
    model.refresh()
    say(mesh, f"resumed from {found} (step {loaded.step}).")
    return loaded


def model_state(model: Sharded, optimizer: AdamW) -> checkpoint.ModelState:
    """The flat shards that a checkpoint holds."""
    return checkpoint.ModelState(
        model.layout, model.master, optimizer.exp_avg, optimizer.exp_avg_sq, int(optimizer.steps)
    )


def load_checkpoint(
    report: RunReport, mesh: Mesh, state: checkpoint.ModelState
) -> tuple[Path, checkpoint.Loaded]:
    """Load the checkpoint that was found, or the newest older one that is whole if it is damaged.

    ValueError where there is none, or `trainer.resume_fallback=false` insists.
    """
    known = report.resume
    assert known is not None
    trainer = report.options.trainer
    # Other ranks have nothing to list: they take rank 0's candidates below.
    folders = [known]
    if trainer.resume_mode == "auto" and trainer.resume_fallback and mesh.rank == 0:
        every = candidates(Path(trainer.default_local_dir), say=False)
        folders = every[every.index(known) :] if known in every else folders
    found, loaded = checkpoint.load_whole(
        _from_first_rank(folders, mesh), state, mesh, trainer.seed
    )
    if found != known:
        _with_other(report, found)
    return found, loaded


def _with_other(report: R, found: Path | None) -> R:
    """The report with another checkpoint than preflight saw. ValueError where it can't be taken."""
    again = check_checkpoint(with_checkpoint(report, found))
    if again.faults:
        raise ValueError("\n".join(map(str, again.faults)))
    return again


def _from_first_rank(value: Any, mesh: Mesh) -> Any:
    """Rank 0's value, on every rank."""
    if mesh.world_group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=mesh.world_group, device=torch.device("cpu"))
    return values[0]
