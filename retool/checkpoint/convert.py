"""A checkpoint's shards, rewritten for another number of ranks. No GPU, no process group."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.flat.fill import CHUNK
from retool.checkpoint.flat.rows import all_rows, rows_numel
from retool.checkpoint.format.checksums import checksums_of, write_archive
from retool.checkpoint.format.folder import (
    CHECKSUMS,
    CONFIG,
    DATA,
    MARK,
    holds_shards,
    recorded_files,
    shard_name,
    write_config,
)
from retool.checkpoint.format.state_dicts import Place, frozen, model_content, optimizer_content
from retool.checkpoint.merge import (
    EMBEDDING,
    HEAD,
    Progress,
    head_is_embedding,
    no_progress,
    require_complete,
)
from retool.checkpoint.publish import claim, mend, publish, remove
from retool.checkpoint.shards.files import Shards
from retool.checkpoint.shards.optimizer import optimizer_step, parameter_group
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.shards.states import extra_state, step_of
from retool.files.durable import fsync
from retool.files.lock import sole_user
from retool.parallel.fsdp.layout import Layout, SlotSpec, make_layout

OF_SHARDS = re.compile(
    rf"(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt|{re.escape(CHECKSUMS)}|{re.escape(CONFIG)}"
)


def convert(
    folder: Path, world: int, out: Path | None = None, progress: Progress = no_progress
) -> Path:
    """Rewrite a checkpoint's shards for `world` ranks, into `out` or in place of the old one.

    Weights, moments, data position and everything but the random states (derived anew on load) come
    along. Scratch files stand in for memory: what is held doesn't grow with the model.
    """
    if world < 1:
        raise ValueError(f"--world-size {world}: it must be at least 1.")
    folder = _checkpoint_of(folder.resolve())  # "." has no name to put .converting after
    final = folder if out is None else out.resolve()
    mend(final)
    where = require_complete(folder)
    if out is not None and final.exists():
        raise ValueError(f"{out} exists. Give another folder, or delete it first.")
    if folder in final.parents:
        raise ValueError(f"{out} lies in the checkpoint itself. Give a folder outside of it.")
    temporary = claim(final, "converting")  # not .tmp: a run's next save clears those away
    try:
        # Locked, so that no other conversion takes it for one that was cut off.
        with sole_user(temporary):
            target = temporary / where.relative_to(folder)
            # The small files that speak of the shards are written last, when all that they speak of
            # is there.
            _copy(folder, temporary, left_out=where)
            step = _write_ranks(where, target, world, progress)
            write_config(target, world, world, step, _checksums_in(temporary, target))
            publish(temporary, final, ours=True)
    except BaseException:
        remove(temporary)
        raise
    return final


def _checkpoint_of(folder: Path) -> Path:
    """The whole that `folder` belongs to, if it is the actor/ of one: data.pt lies above it."""
    return folder.parent if f"../{DATA}" in recorded_files(folder) else folder


def _copy(source: Path, target: Path, left_out: Path) -> None:
    """Copy a folder into one that is there, synced to the disk, but for the shards in `left_out` and
    what is said of them.

    Modes aren't copied: a checkpoint that may only be read can be converted, too.
    """
    for path in sorted(source.iterdir()):
        if path.is_dir():
            (target / path.name).mkdir()
            _copy(path, target / path.name, left_out)
        elif path.name != MARK and not (source == left_out and OF_SHARDS.fullmatch(path.name)):
            shutil.copyfile(path, target / path.name)
            fsync(target / path.name)
    fsync(target)


def _checksums_in(temporary: Path, target: Path) -> dict[str, Any]:
    """The checksums of every file that was written, by its name relative to the model files'
    folder.
    """
    files: dict[str, Any] = {}
    for path in sorted(target.rglob("*")):
        if path.is_file() and path.name != MARK:
            files[path.relative_to(target).as_posix()] = checksums_of(path)
    data = temporary / DATA
    if data.exists():
        files[os.path.relpath(data, target)] = checksums_of(data)
    return files


def file_layout(source: ShardSource, shards: int) -> Layout:
    """A layout of a checkpoint's parameters as they are on disk, each as a unit of its own.

    A tied head is an alias.
    """
    names = list(source.names())
    aliases: tuple[tuple[str, str], ...] = ()
    if head_is_embedding(source, source.folder / "huggingface"):
        names.remove(HEAD)
        aliases = ((HEAD, EMBEDDING),)
    units = []
    for name in names:
        shape = source.shape(name)
        slot = SlotSpec(name, shape, [(name, shape)])
        units.append((name, [slot]))
    return make_layout(units, shards, aliases)


def _write_ranks(where: Path, target: Path, world: int, progress: Progress) -> int:
    """All ranks' files, one after the other; the checkpoint's step."""
    source = ShardSource(where)
    layout = file_layout(source, world)
    extra = _shared_extra(where)
    step = step_of((extra or {}).get("step", 0), where)
    moments: list[ShardSource] = []
    optim: Shards | None = None
    if holds_shards(where, "optim"):
        optim = Shards(where, "optim")
        moments = [ShardSource(optim, which) for which in ("exp_avg", "exp_avg_sq")]
    for rank in range(world):
        place = Place(rank, world)
        params = _fill(layout, rank, source, target / "scratch", progress)
        write_archive(
            target / shard_name("model", world, rank),
            model_content(layout, place, params, step),
        )
        if optim is not None:
            exp_avg = _fill(layout, rank, moments[0], target / "scratch0", progress)
            exp_avg_sq = _fill(layout, rank, moments[1], target / "scratch1", progress)
            content = optimizer_content(
                layout, place, (exp_avg, exp_avg_sq), optimizer_step(optim), parameter_group(optim)
            )
            write_archive(target / shard_name("optim", world, rank), content)
        if extra is not None:
            write_archive(target / shard_name("extra_state", world, rank), frozen(extra, "extra"))
    return step


def _fill(
    layout: Layout, rank: int, source: ShardSource, scratch: Path, progress: Progress
) -> torch.Tensor:
    """A rank's row buffer, in an unlinked scratch file that the kernel may write out."""
    numel = rows_numel(layout, rank)
    dtype = source.dtype(next(iter(source.names())))
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    buffer = torch.from_file(str(scratch), shared=True, size=numel, dtype=dtype)
    # Unlinked at once: the mapping keeps it alive, and a process that is killed leaves nothing
    # behind.
    scratch.unlink()
    for rows in all_rows(layout, rank):
        for start in range(rows.start, rows.stop, CHUNK):
            stop = min(start + CHUNK, rows.stop)
            at = rows.offset + start - rows.start
            buffer[at : at + stop - start] = source.read(rows.member.name, start, stop)
            # Or the mapped pages of all ranks' files would count as this process's memory.
            source.release()
            progress(rows.member.name, stop - start)
    return buffer


def _shared_extra(where: Path) -> dict[str, Any] | None:
    """The part of our extra state that all ranks share; None for another program's."""
    extra = extra_state(where, 0)
    return None if extra is None else {key: value for key, value in extra.items() if key != "rng"}
