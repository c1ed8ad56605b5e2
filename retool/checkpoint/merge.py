"""Sharded checkpoint → Hugging Face folder, and the same checkpoint for another number of ranks.

No GPU, no process group.

Tensors pass through in pieces of CHUNK elements, so memory doesn't grow with the model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint import folder as on_disk
from retool.checkpoint.claim import claim, publish, remove
from retool.checkpoint.format.archive import WAY_OUT, write_archive
from retool.checkpoint.format.content import Place, frozen, model_content, optimizer_content
from retool.checkpoint.format.rows import all_rows, rows_numel
from retool.checkpoint.format.safetensors import INDEX, SHARD_BYTES, SINGLE, WeightsWriter
from retool.checkpoint.format.source import CHUNK, same_values
from retool.checkpoint.hf.folder import copy_side_files, tied, untie
from retool.checkpoint.mixture import require_one_step
from retool.checkpoint.shards import (
    Shards,
    ShardSource,
    extra_state,
    optimizer_step,
    parameter_group,
    step_of,
)
from retool.parallel.fsdp.layout import Layout, make_layout

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
Progress = Callable[[str, int], None]  # (what, elements done since the last call)


def _quiet(what: str, done: int) -> None:
    del what, done


def merge(
    folder: Path,
    out: Path,
    dtype: torch.dtype,
    progress: Progress = _quiet,
    limit: int = SHARD_BYTES,
) -> list[Path]:
    """Write the weights of a sharded checkpoint, ours or verl's, into `out` as safetensors files of
    at most `limit` bytes.

    The small files of its `huggingface/` come along with the dtype set. ValueError if the
    checkpoint is incomplete or damaged, or `out` has weights already.
    """
    where = _complete(folder)
    if (out / SINGLE).exists() or (out / INDEX).exists():
        raise ValueError(f"{out} already holds weights. Give another folder, or delete it first.")
    source = ShardSource(where)
    small = where / "huggingface"
    if small.is_dir():
        copy_side_files(small, out, dtype)
    out.mkdir(parents=True, exist_ok=True)
    names = stored_names(source, small)
    if tied(small) and HEAD in names:
        untie(out / "config.json")
    writer = WeightsWriter(out, {name: source.shape(name) for name in names}, dtype, limit)
    try:
        for name, shape in writer.tensors.items():
            for start in range(0, prod(shape), CHUNK):
                stop = min(start + CHUNK, prod(shape))
                writer.write(source.read(name, start, stop))
                source.release()
                progress(name, stop - start)
        writer.close()
    except BaseException:
        writer.abandon()
        for path in writer.files:  # half an export would load, with garbage in it
            path.unlink(missing_ok=True)
        raise
    return writer.files


def stored_names(source: ShardSource, config_folder: Path) -> list[str]:
    """The parameters that an export stores: not a head that is the embedding."""
    return [
        name for name in source.names() if name != HEAD or not _is_embedding(source, config_folder)
    ]


def _is_embedding(source: ShardSource, config_folder: Path) -> bool:
    """Whether the checkpoint's head is its embedding: config.json says so, and the values are the
    same, whoever wrote them.
    """
    names = source.names()
    return (
        HEAD in names
        and EMBEDDING in names
        and tied(config_folder)
        and same_values(source, HEAD, EMBEDDING)
    )


def _complete(folder: Path) -> Path:
    where = on_disk.model_folder(folder)
    if wrong := on_disk.faults(where):
        raise ValueError(
            f"{folder} is not a complete checkpoint: {'; '.join(wrong[:5])}. {WAY_OUT}"
        )
    if not on_disk.recorded(where):  # else each byte is compared with its checksum when it is read
        require_one_step(where)
    return where


def convert(folder: Path, world: int, out: Path | None = None, progress: Progress = _quiet) -> Path:
    """Rewrite a checkpoint's shards for `world` ranks, into `out` or in place of the old one.

    Weights, moments, data position and everything but the random states (derived anew on load) come
    along. Scratch files stand in for memory: what is held doesn't grow with the model.
    """
    if world < 1:
        raise ValueError(f"--world-size {world}: it must be at least 1.")
    folder = folder.resolve()  # "." has no name to put .tmp after
    where = _complete(folder)
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
                n for n in names if n == on_disk.MARK or (n.endswith(".pt") and n != on_disk.DATA)
            ],
        )
        for name in (on_disk.CHECKSUMS, on_disk.CONFIG):
            (target / name).unlink(missing_ok=True)
        step = _write_ranks(where, target, world, progress)
        written = [p for p in sorted(target.rglob("*")) if p.is_file() and p.name != on_disk.MARK]
        files = {p.relative_to(target).as_posix(): on_disk.checksums(p) for p in written}
        if (data := temporary / on_disk.DATA).exists():
            files[os.path.relpath(data, target)] = on_disk.checksums(data)
        on_disk.write_config(target, world, world, step, files)
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
    is_tied = _is_embedding(source, source.folder / "huggingface")
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
            target / on_disk.shard_name("model", world, rank),
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
            write_archive(target / on_disk.shard_name("optim", world, rank), content)
        if extra is not None:
            (target / on_disk.shard_name("extra_state", world, rank)).write_bytes(
                frozen(extra, "extra")
            )
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
