"""Saving: flat shards → rows on the host (the training loop waits for this) → files, agreed by all
ranks, then the tracker.

    save() ── to_rows per unit ── host buffers ──┬── returns to training
                                                 └── thread: shards, export | all agree | rename | tracker | prune

The thread talks over a gloo group of its own, so it never meets the training's collectives.
Whatever goes wrong on one rank is told to all, the temporary folder is removed, the previous
checkpoint stays, and the result carries the reason.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from retool.checkpoint.flat.state import ModelState
from retool.checkpoint.format.checksums import checksums_of, write_archive
from retool.checkpoint.format.folder import DATA, shard_name, write_config
from retool.checkpoint.format.state_dicts import Place, frozen, model_content, optimizer_content
from retool.checkpoint.format.tracker import candidates
from retool.checkpoint.hf.export import export_weights
from retool.checkpoint.hf.side_files import copy_side_files, stop_at
from retool.checkpoint.publish import claim, clear_torn, prune, publish, remove, track
from retool.checkpoint.remote import Mirror
from retool.checkpoint.rng import capture
from retool.checkpoint.staging import Staging, stage
from retool.checkpoint.types import CONTENTS, PendingSave, SaveOptions, TrainingState
from retool.config.redact import logger
from retool.files.durable import fsync
from retool.parallel.agreement import GivenUp, all_or_none, describe, from_first_rank
from retool.parallel.mesh import Mesh

log = logger("retool.checkpoint")


@dataclass(frozen=True)
class _Snapshot:
    """Everything that a save writes, on the host, where training can't change it.

    Of `state` only what training doesn't change is read: its layout and hyperparameters.
    """

    folder: Path  # the checkpoint's, once it is complete
    step: int
    mesh: Mesh
    state: ModelState
    host: dict[str, torch.Tensor]  # row buffers: params, exp_avg, exp_avg_sq
    extra: bytes
    data_state: bytes
    model_folder: Path
    options: SaveOptions
    written: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # checksums of this rank's files


def save(
    root: Path | str,
    state: ModelState,
    mesh: Mesh,
    training: TrainingState,
    *,
    model_folder: Path | str,
    options: SaveOptions | None = None,
    staging: Staging | None = None,
) -> PendingSave:
    """Save into `root/global_step_N`. A collective call; waits for a previous save of the same
    `staging` first.

    This rank's random states are added to `training`. `model_folder` is the source model, whose
    config and tokenizer files go into `huggingface/`.

    With `options.async_save` the call returns once everything is in host memory. Without, it
    returns when the checkpoint is complete or has failed: see the result's `error`.
    """
    options = options or SaveOptions()
    staging = staging or Staging(mesh)
    if staging.pending is not None:
        # It is still being written from the buffers that this one fills
        staging.pending.wait()
    pending = PendingSave(training.step, Path(root) / f"global_step_{training.step}")
    if mesh.rank == 0 and options.remote_url is not None and staging.mirror is None:
        staging.mirror = Mirror(options.remote_url)
    extra = {
        "lr_scheduler": {},  # which other programs look for
        **training.extra,
        "step": training.step,
        "rng": capture(mesh.device),
    }
    # To bytes at once: training goes on changing what these refer to
    extra_file = frozen(extra, "extra")
    data_file = frozen(dict(training.data_state), "data_state")
    try:
        host = stage(state, mesh, options, staging)
    except GivenUp as failure:
        _end(pending, mesh, str(failure))
        return pending
    snapshot = _Snapshot(
        folder=pending.folder,
        step=training.step,
        mesh=mesh,
        state=state,
        host=host,
        extra=extra_file,
        data_state=data_file,
        model_folder=Path(model_folder),
        options=options,
    )
    staging.pending = pending
    if options.async_save:
        pending.let_training_go_on()
        work = (snapshot, staging, pending)
        threading.Thread(target=_run, args=work, name="checkpoint", daemon=True).start()
    else:
        _run(snapshot, staging, pending)
    return pending


def _run(snapshot: _Snapshot, staging: Staging, pending: PendingSave) -> None:
    """Write a snapshot and report how it went. Never raises."""
    error = None
    try:
        _write(snapshot, staging)
    except GivenUp as failure:
        error = str(failure)
    except Exception as failure:
        error = f"rank {snapshot.mesh.rank}: {describe(failure)}"
    size = sum(entry["size"] for entry in snapshot.written.values())
    _end(pending, snapshot.mesh, error, size)


def _end(pending: PendingSave, mesh: Mesh, error: str | None, bytes_written: int = 0) -> None:
    if error is not None and mesh.rank == 0:
        log.error("%s was not saved: %s. %s", pending.folder, error, _what_stays(pending.folder))
    pending.finish(error, bytes_written)


def _what_stays(failed: Path) -> str:
    """Which checkpoint a resume takes now."""
    try:
        older = [folder for folder in candidates(failed.parent, say=False) if folder != failed]
    except OSError:
        return "The run's folder can't be read, either."
    return f"{older[0].name} stays the newest." if older else "There is no checkpoint before it."


def _write(snapshot: _Snapshot, staging: Staging) -> None:
    """Write, agree, rename, agree, track, prune.

    Whatever was written and has no name yet goes again.
    """
    rank = snapshot.mesh.rank
    temporary = from_first_rank(rank, staging.group, lambda: _prepare(snapshot, staging))
    try:
        _fill(snapshot, staging, temporary)
    except BaseException:
        if rank == 0:
            remove(temporary)
        raise


def _prepare(snapshot: _Snapshot, staging: Staging) -> Path:
    """Rank 0: a fresh folder beside the final one, with the model's small files in it.

    What torn saves left is removed.
    """
    staging.require_folder()
    root = snapshot.folder.parent
    root.mkdir(parents=True, exist_ok=True)
    clear_torn(root)
    temporary = claim(snapshot.folder)
    try:
        target = temporary / snapshot.options.subfolder
        target.mkdir(exist_ok=True)
        copy_side_files(
            snapshot.model_folder,
            target / "huggingface",
            torch.bfloat16,
            snapshot.options.chat_template,
        )
        stop_at(target / "huggingface", snapshot.options.turn_ends)
    except BaseException:
        remove(temporary)
        raise
    return temporary


def _fill(snapshot: _Snapshot, staging: Staging, temporary: Path) -> None:
    """All ranks' files into the temporary folder, then its name."""
    rank = snapshot.mesh.rank
    group = staging.group
    target = temporary / snapshot.options.subfolder
    # Every rank waits here for every other: a file that one couldn't write fails the save on all of
    # them.
    all_or_none(rank, group, lambda: _write_shards(snapshot, target))
    if "hf_model" in snapshot.options.contents:
        layout = snapshot.state.layout
        params = snapshot.host["params"]
        export = export_weights(layout, snapshot.mesh, params, target / "huggingface", group)
        for name, entry in export.items():
            snapshot.written[f"huggingface/{name}"] = entry
    everyone = _gather_written(snapshot, group)

    def commit_on_first_rank() -> None:
        if rank == 0:
            _commit(snapshot, temporary, everyone, staging)

    all_or_none(rank, group, commit_on_first_rank)


def _gather_written(snapshot: _Snapshot, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """On rank 0 the checksums of every rank's files, by name; elsewhere empty."""
    if group is None:
        return dict(snapshot.written)
    rank = snapshot.mesh.rank
    gathered: list[Any] | None = [None] * snapshot.mesh.world if rank == 0 else None
    dist.gather_object(snapshot.written, gathered, dst=0, group=group)
    files: dict[str, Any] = {}
    for written in gathered or ():
        files.update(written)
    return files


def _write_shards(snapshot: _Snapshot, target: Path) -> None:
    """This rank's files, synced to the disk, and their checksums."""
    mesh = snapshot.mesh
    host = snapshot.host
    state = snapshot.state
    place = Place(mesh.rank, mesh.shards, mesh.replicas)
    contents = snapshot.options.contents

    # Functions, not contents: each is made by the thread that writes it.
    makers: dict[str, Callable[[], Any]] = {}
    if "optimizer" in contents and "exp_avg" in host:
        moments = (host["exp_avg"], host["exp_avg_sq"])
        makers["optim"] = lambda: optimizer_content(
            state.layout, place, moments, state.updates, state.hyperparameters
        )
    if "model" in contents:
        makers["model"] = lambda: model_content(state.layout, place, host["params"], snapshot.step)
    if "extra" in contents:
        makers["extra_state"] = lambda: snapshot.extra

    def write(kind: str) -> None:
        name = shard_name(kind, mesh.world, mesh.rank)
        snapshot.written[name] = write_archive(target / name, makers[kind]())

    # Side by side, as each waits for the disk in its turn.
    with ThreadPoolExecutor(len(CONTENTS)) as pool:
        list(pool.map(write, makers))


def _commit(
    snapshot: _Snapshot, temporary: Path, written: dict[str, Any], staging: Staging
) -> None:
    """Rank 0, when every rank's files are on disk: the small files, the name, the tracker."""
    mesh = snapshot.mesh
    target = temporary / snapshot.options.subfolder
    export = target / "huggingface"
    files = dict(written)
    for path in sorted(export.rglob("*")):
        name = str(path.relative_to(target))
        if path.is_file() and name not in files:
            fsync(path)
            files[name] = checksums_of(path)
    # In reinforcement learning data.pt lies above the model files.
    data = temporary / DATA
    files[os.path.relpath(data, target)] = write_archive(data, snapshot.data_state)
    write_config(target, mesh.world, mesh.shards, snapshot.step, files)
    # The files are on the disk. Their folders' entries must be, too, before the name says that all
    # is there.
    inside_export = {path for path in export.rglob("*") if path.is_dir()}
    for folder in {temporary, target, export, *inside_export}:
        fsync(folder)
    # Once more: it may have been moved or deleted during the minutes in which the files were
    # written.
    staging.require_folder()
    publish(temporary, snapshot.folder)
    root = snapshot.folder.parent
    # After the rename: the tracker never names a folder that isn't complete.
    track(root, snapshot.step)
    mirror = staging.mirror
    being_copied = frozenset(mirror.busy()) if mirror is not None else frozenset[Path]()
    prune(root, snapshot.options.keep, being_copied)
    if mirror is not None:
        mirror.add(snapshot.folder)
