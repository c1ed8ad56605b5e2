"""A checkpoint's shards, rewritten for another number of ranks. No GPU, no process group."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint.flat.fill import CHUNK
from retool.checkpoint.flat.rows import all_rows, rows_numel
from retool.checkpoint.format.checksums import checksums_of, write_archive
from retool.checkpoint.format.folder import CHECKSUMS, CONFIG, DATA, MARK, shard_name, write_config
from retool.checkpoint.format.state_dicts import Place, frozen, model_content, optimizer_content
from retool.checkpoint.merge import (
    EMBEDDING,
    HEAD,
    Progress,
    head_is_embedding,
    no_progress,
    require_complete,
)
from retool.checkpoint.publish import claim, publish, remove
from retool.checkpoint.shards.files import Shards
from retool.checkpoint.shards.optimizer import optimizer_step, parameter_group
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.shards.states import extra_state, step_of
from retool.parallel.fsdp.layout import Layout, make_layout


def convert(
    folder: Path, world: int, out: Path | None = None, progress: Progress = no_progress
) -> Path:
    """Rewrite a checkpoint's shards for `world` ranks, into `out` or in place of the old one.

    Weights, moments, data position and everything but the random states (derived anew on load) come
    along. Scratch files stand in for memory: what is held doesn't grow with the model.
    """
    if world < 1:
        raise ValueError(f"--world-size {world}: it must be at least 1.")
    folder = folder.resolve()  # "." has no name to put .tmp after
    where = require_complete(folder)
    final = folder if out is None else out.resolve()
    if out is not None and final.exists():
        raise ValueError(f"{out} exists. Give another folder, or delete it first.")
    temporary = claim(final, "converting")  # not .tmp: a run's next save clears those away
    try:
        target = temporary / where.relative_to(folder)
        shutil.copytree(
            folder,
            temporary,
            dirs_exist_ok=True,
            ignore=lambda _, names: [
                n for n in names if n == MARK or (n.endswith(".pt") and n != DATA)
            ],
        )
        for name in (CHECKSUMS, CONFIG):
            (target / name).unlink(missing_ok=True)
        step = _write_ranks(where, target, world, progress)
        written = [p for p in sorted(target.rglob("*")) if p.is_file() and p.name != MARK]
        files = {p.relative_to(target).as_posix(): checksums_of(p) for p in written}
        if (data := temporary / DATA).exists():
            files[os.path.relpath(data, target)] = checksums_of(data)
        write_config(target, world, world, step, files)
        publish(temporary, final, ours=True)
    except BaseException:
        remove(temporary)
        raise
    return final


def file_layout(source: ShardSource, shards: int) -> Layout:
    """A layout of a checkpoint's parameters as they are on disk, each a unit of its own.

    A tied head is an alias.
    """
    names = list(source.names())
    is_tied = head_is_embedding(source, source.folder / "huggingface")
    kept = [n for n in names if not (is_tied and n == HEAD)]
    aliases = ((HEAD, EMBEDDING),) if is_tied else ()
    return make_layout(
        [(n, [(n, source.shape(n), [(n, source.shape(n))], True)]) for n in kept], shards, aliases
    )


def _write_ranks(where: Path, target: Path, world: int, progress: Progress) -> int:
    """All ranks' files, one after the other; the checkpoint's step."""
    source = ShardSource(where)
    layout = file_layout(source, world)
    extra = _shared_extra(where)
    step = step_of((extra or {}).get("step", 0), where)
    moments: list[ShardSource] = []
    optim: Shards | None = None
    if any(where.glob("optim_world_size_*_rank_0.pt")):
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
            first, second = (
                _fill(layout, rank, moment, target / f"scratch{i}", progress)
                for i, moment in enumerate(moments)
            )
            content = optimizer_content(
                layout, place, first, second, optimizer_step(optim), parameter_group(optim)
            )
            write_archive(target / shard_name("optim", world, rank), content)
        if extra is not None:
            (target / shard_name("extra_state", world, rank)).write_bytes(frozen(extra, "extra"))
    return step


def _fill(
    layout: Layout, rank: int, source: ShardSource, scratch: Path, progress: Progress
) -> torch.Tensor:
    """A rank's row buffer, in an unlinked scratch file that the kernel may write out."""
    numel = rows_numel(layout, rank)
    dtype = source.dtype(next(iter(source.names())))
    buffer = (
        torch.from_file(str(scratch), shared=True, size=numel, dtype=dtype)
        if numel
        else torch.empty(0, dtype=dtype)
    )
    scratch.unlink(missing_ok=True)
    for rows in all_rows(layout, rank):
        for start in range(rows.start, rows.stop, CHUNK):
            stop = min(start + CHUNK, rows.stop)
            at = rows.offset + start - rows.start
            buffer[at : at + stop - start] = source.read(rows.member.name, start, stop)
            source.release()
            progress(rows.member.name, stop - start)
    return buffer


def _shared_extra(where: Path) -> dict[str, Any] | None:
    """What all ranks share of our extra state; None for another program's."""
    extra = extra_state(where, 0)
    return None if extra is None else {key: value for key, value in extra.items() if key != "rng"}
