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
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from retool.checkpoint.flat.state import ModelState
from retool.checkpoint.format.checksums import checksums_of, write_archive
from retool.checkpoint.format.folder import DATA, fsync, shard_name, write_config
from retool.checkpoint.format.state_dicts import Place, frozen, model_content, optimizer_content
from retool.checkpoint.hf.export import export_weights
from retool.checkpoint.hf.side_files import copy_side_files
from retool.checkpoint.publish import claim, clear_torn, prune, publish, remove, track
from retool.checkpoint.remote import Mirror
from retool.checkpoint.rng import capture
from retool.checkpoint.staging import Staging, stage
from retool.checkpoint.types import CONTENTS, PendingSave, SaveOptions, SaveResult
from retool.config.redact import logger
from retool.parallel.agreement import Failed, agreed, describe, shared
from retool.parallel.mesh import Mesh

log = logger("retool.checkpoint")


@dataclass(frozen=True)
class _Snapshot:
    """Everything a save writes, on the host and out of training's reach."""

    state: ModelState
    mesh: Mesh
    root: Path
    step: int
    host: dict[str, torch.Tensor]
    extra: bytes
    data_state: bytes
    model_folder: Path
    options: SaveOptions
    group: Mapping[str, Any]
    written: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def final(self) -> Path:
        return self.root / f"global_step_{self.step}"


def save(
    root: Path | str,
    state: ModelState,
    mesh: Mesh,
    *,
    step: int,
    extra: Mapping[str, Any],
    data_state: Mapping[str, Any],
    model_folder: Path | str,
    options: SaveOptions | None = None,
    optimizer_group: Mapping[str, Any] | None = None,
    staging: Staging | None = None,
) -> PendingSave:
    """Save step `step` into `root/global_step_N`.

    A collective call; waits for a previous save of the same `staging` first.

    `extra` (this rank's) and `data_state` (rank 0's counts) hold tensors, strings, numbers, lists
    and dicts only; this rank's random states are added. `model_folder` is the source model, whose
    config and tokenizer files go into `huggingface/`. `optimizer_group` is AdamW's hyperparameters
    (lr, betas, …) for readers that load them. With `options.async_save` the call returns once
    everything is in host memory. Without, it returns when the checkpoint is complete or has failed:
    see the result's `error`.
    """
    options = options or SaveOptions()
    staging = staging or Staging(mesh)
    if staging.pending is not None:
        staging.pending.wait()
    begin = time.perf_counter()
    pending = PendingSave()
    if mesh.rank == 0 and options.remote_url is not None and staging.mirror is None:
        staging.mirror = Mirror(options.remote_url)
    own = frozen({"lr_scheduler": {}, **extra, "step": step, "rng": capture(mesh.device)}, "extra")
    common = frozen(dict(data_state), "data_state")
    try:
        host = stage(state, mesh, options, staging)
    except Failed as failure:
        return _ended(Path(root), step, mesh, pending, str(failure), begin)
    snapshot = _Snapshot(
        state,
        mesh,
        Path(root),
        step,
        host,
        own,
        common,
        Path(model_folder),
        options,
        optimizer_group or {},
    )
    staging.pending = pending
    stall = time.perf_counter() - begin
    if options.async_save:
        threading.Thread(
            target=_run,
            args=(snapshot, staging, pending, begin, stall),
            name="checkpoint",
            daemon=True,
        ).start()
    else:
        _run(snapshot, staging, pending, begin, None)
    return pending


def _run(
    snapshot: _Snapshot, staging: Staging, pending: PendingSave, begin: float, stall: float | None
) -> None:
    """Write a snapshot, say how it went, and never raise."""
    error = None
    try:
        _write(snapshot, staging)
    except Exception as failure:
        error = (
            str(failure)
            if isinstance(failure, Failed)
            else f"rank {snapshot.mesh.rank}: {describe(failure)}"
        )
    _ended(
        snapshot.root,
        snapshot.step,
        snapshot.mesh,
        pending,
        error,
        begin,
        stall,
        sum(e["size"] for e in snapshot.written.values()),
    )


def _ended(
    root: Path,
    step: int,
    mesh: Mesh,
    pending: PendingSave,
    error: str | None,
    begin: float,
    stall: float | None = None,
    size: int = 0,
) -> PendingSave:
    final = root / f"global_step_{step}"
    seconds = time.perf_counter() - begin
    if error is not None and mesh.rank == 0:
        log.error(
            "%s was not saved: %s. The previous checkpoint stays; training goes on.", final, error
        )
    pending._finish(
        SaveResult(step, final, error, seconds if stall is None else stall, seconds, size)
    )
    return pending


def _write(snapshot: _Snapshot, staging: Staging) -> None:
    """Write, agree, rename, agree, track, prune.

    Whatever was written and has no name yet goes again.
    """
    rank = snapshot.mesh.rank
    group = staging.group
    temporary = shared(rank, group, lambda: _prepare(snapshot, staging))
    try:
        _fill(snapshot, staging, temporary)
    except BaseException:
        if rank == 0:
            remove(temporary)
        raise


def _fill(snapshot: _Snapshot, staging: Staging, temporary: Path) -> None:
    rank = snapshot.mesh.rank
    group = staging.group
    target = temporary / snapshot.options.subfolder
    agreed(rank, group, lambda: _write_shards(snapshot, target))
    if "hf_model" in snapshot.options.contents:
        files = export_weights(
            snapshot.state.layout,
            snapshot.mesh,
            snapshot.host["params"],
            target / "huggingface",
            group,
        )
        snapshot.written.update({f"huggingface/{name}": entry for name, entry in files.items()})
    everyone: list[Any] = [snapshot.written]
    if group is not None:
        everyone = [None] * snapshot.mesh.world
        dist.gather_object(snapshot.written, everyone if rank == 0 else None, dst=0, group=group)
    agreed(
        rank, group, lambda: _commit(snapshot, temporary, everyone, staging) if rank == 0 else None
    )


def _prepare(snapshot: _Snapshot, staging: Staging) -> Path:
    """Rank 0: a fresh folder aside, with the model's small files in it; what torn saves left is
    removed.
    """
    staging.require_folder()
    snapshot.root.mkdir(parents=True, exist_ok=True)
    clear_torn(snapshot.root)
    temporary = claim(snapshot.final)
    try:
        target = temporary / snapshot.options.subfolder
        target.mkdir(exist_ok=True)
        copy_side_files(
            snapshot.model_folder,
            target / "huggingface",
            torch.bfloat16,
            snapshot.options.chat_template,
        )
    except BaseException:
        remove(temporary)
        raise
    return temporary


def _write_shards(snapshot: _Snapshot, target: Path) -> None:
    """This rank's files, fsynced, and their checksums: side by side, as each waits for the disk in
    its turn.
    """
    mesh = snapshot.mesh
    host = snapshot.host
    contents = snapshot.options.contents
    layout = snapshot.state.layout
    place = Place(mesh.rank, mesh.shards, mesh.replicas)
    step = snapshot.state.step
    group = snapshot.group
    wanted: dict[str, Callable[[], Any]] = {}
    if "optimizer" in contents and "exp_avg" in host:
        wanted["optim"] = lambda: optimizer_content(
            layout, place, host["exp_avg"], host["exp_avg_sq"], step, group
        )
    if "model" in contents:
        wanted["model"] = lambda: model_content(layout, place, host["params"], snapshot.step)
    if "extra" in contents:
        wanted["extra_state"] = lambda: snapshot.extra

    def write(kind: str) -> None:
        name = shard_name(kind, mesh.world, mesh.rank)
        snapshot.written[name] = write_archive(target / name, wanted[kind]())

    with ThreadPoolExecutor(len(CONTENTS)) as pool:
        list(pool.map(write, wanted))


def _commit(
    snapshot: _Snapshot, temporary: Path, everyone: list[dict[str, Any]], staging: Staging
) -> None:
    """Rank 0, when every rank's files are on disk: the small files, the name, the tracker."""
    target = temporary / snapshot.options.subfolder
    options = snapshot.options
    root = snapshot.root
    data = temporary / DATA
    beside = os.path.relpath(data, target)  # above the model files in reinforcement learning
    files: dict[str, Any] = {name: entry for written in everyone for name, entry in written.items()}
    for path in sorted(p for p in (target / "huggingface").rglob("*") if p.is_file()):
        if (name := str(path.relative_to(target))) not in files:
            fsync(path)
            files[name] = checksums_of(path)
    files[beside] = write_archive(data, snapshot.data_state)
    write_config(target, snapshot.mesh.world, snapshot.mesh.shards, snapshot.step, files)
    for path in {temporary, target, target / "huggingface"}:
        fsync(path)
    staging.require_folder()
    publish(temporary, snapshot.final)
    track(root, snapshot.step)
    prune(
        root,
        options.keep,
        frozenset(staging.mirror.busy()) if staging.mirror is not None else frozenset(),
    )
    if staging.mirror is not None:
        staging.mirror.add(snapshot.final)
