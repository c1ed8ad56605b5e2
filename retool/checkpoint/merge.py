"""Sharded checkpoint → Hugging Face folder. No GPU, no process group."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from retool.checkpoint.flat.fill import CHUNK, same_values
from retool.checkpoint.format.folder import faulty_files, model_folder, recorded_files
from retool.checkpoint.format.safetensors import INDEX, SHARD_BYTES, SINGLE, WeightsWriter
from retool.checkpoint.format.torch_file import WAY_OUT
from retool.checkpoint.format.tracker import checkpoints
from retool.checkpoint.hf.side_files import copy_side_files, tied, untie
from retool.checkpoint.shards.same_step import require_one_step
from retool.checkpoint.shards.source import ShardSource
from retool.model.hf.names import EMBEDDING, HEAD

Progress = Callable[[str, int], None]  # (what, elements done since the last call)


def no_progress(what: str, done: int) -> None:
    del what, done


def merge(
    folder: Path,
    out: Path,
    dtype: torch.dtype,
    progress: Progress = no_progress,
    limit: int = SHARD_BYTES,
) -> list[Path]:
    """Write the weights of a sharded checkpoint, ours or verl's, into `out` as safetensors files of
    at most `limit` bytes.

    The small files of its `huggingface/` come along with the dtype set. ValueError if the
    checkpoint is incomplete or damaged, or `out` has weights already.
    """
    where = require_complete(folder)
    if (out / SINGLE).exists() or (out / INDEX).exists():
        raise ValueError(f"{out} already holds weights. Give another folder, or delete it first.")
    source = ShardSource(where)
    small = where / "huggingface"
    if small.is_dir():
        copy_side_files(small, out, dtype)
    out.mkdir(parents=True, exist_ok=True)
    names = stored_names(source, small)
    # The matrices differ although config.json ties them: both are written, and the config must say
    # so.
    if tied(small) and HEAD in names:
        untie(out / "config.json")
    writer = WeightsWriter(out, {name: source.shape(name) for name in names}, dtype, limit)
    try:
        for name, shape in writer.tensors.items():
            # Piece by piece: neither a model nor its largest matrix need fit into memory
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
        name
        for name in source.names()
        if name != HEAD or not head_is_embedding(source, config_folder)
    ]


def head_is_embedding(source: ShardSource, config_folder: Path) -> bool:
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


def require_complete(folder: Path) -> Path:
    where = model_folder(folder)
    if wrong := faulty_files(where):
        said = "; ".join(wrong[:5]).removesuffix(".")
        # Of a run, which of its checkpoints to give has been said
        way_out = "" if any(checkpoints(folder)) else f" {WAY_OUT}"
        raise ValueError(f"{folder} is not a complete checkpoint: {said}.{way_out}")
    if not recorded_files(where):  # else each byte is compared with its checksum when it is read
        require_one_step(where)
    return where
