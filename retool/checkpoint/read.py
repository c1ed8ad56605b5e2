"""Resuming: fill this rank's flat shards from a checkpoint that any number of ranks wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retool.checkpoint import rng
from retool.checkpoint.flat.fill import load_flat
from retool.checkpoint.flat.state import ModelState, require_finite, require_same_replicas
from retool.checkpoint.format.folder import (
    CONFIG,
    faulty_files,
    model_folder,
    read_small_json,
    shard_name,
    world_size,
    written_by_us,
)
from retool.checkpoint.format.torch_file import WAY_OUT
from retool.checkpoint.shards.files import Shards
from retool.checkpoint.shards.optimizer import optimizer_step
from retool.checkpoint.shards.same_step import require_one_step_unless_vouched
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.shards.states import data_state, extra_state, step_of
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import Mesh

WAY_OUT_OF_RESUME = "Resume from an older one (trainer.resume_from_path)."


class Unusable(ValueError):
    """A checkpoint that is complete, but can't be resumed."""


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds besides the tensors.

    `step` is the training step of the checkpoint, `optimizer_step` AdamW's count. `extra` is what
    was given to `save`: this rank's own where `same_layout`, else rank 0's. Both dicts are empty
    for a checkpoint that another program wrote.
    """

    extra: dict[str, Any]
    data_state: dict[str, Any]
    step: int
    optimizer_step: int
    same_layout: bool


def load(folder: Path | str, state: ModelState, mesh: Mesh, seed: int) -> Loaded:
    """Fill `state`'s flats in place from a checkpoint of ours or verl's, written by any number of
    ranks. A collective call.

    Moments are read where `state` has them. Random states are put back where the world size is the
    same; otherwise they are derived (seed, step, rank). ValueError, the same one on all ranks, names
    the file and what is wrong with it.

    Host memory besides the flats: on the ranks that wrote it, next to nothing; on others, at most
    `fill.THREADS` chunks of `fill.CHUNK` elements, where one is put together from two files
    (256 MB in fp32; 91 MB measured for 0.6 GB of state). The files are mapped: what was read of
    them is page cache, which the kernel takes back when it is short.
    """
    top = Path(folder)
    loaded = _all_or_none(mesh, lambda: _fill(top, state, mesh, seed))
    require_finite(state.layout, mesh, state.params, f"{top} can't be resumed", WAY_OUT_OF_RESUME)
    for flat in (state.params, state.exp_avg, state.exp_avg_sq):
        if flat is not None:
            require_same_replicas(state.layout, mesh, flat, str(top))
    return loaded


def _all_or_none(mesh: Mesh, read: Callable[[], Loaded]) -> Loaded:
    """What this rank read, once all have read theirs; where one couldn't, its ValueError on all.

    Damage is often in one rank's part alone. If the others didn't hear of it, they would meet it
    in other exchanges, or go on from another checkpoint.
    """
    loaded = None
    error = None
    try:
        loaded = read()
    except (ValueError, OSError) as failure:
        error = (str(failure), isinstance(failure, Unusable))
    failed = [each for each in gather_objects(error, mesh.world_group) if each is not None]
    if failed:
        # First what an older checkpoint wouldn't mend
        words, unusable = max(failed, key=lambda each: each[1])
        raise Unusable(words) if unusable else ValueError(words)
    assert loaded is not None
    return loaded


def _fill(top: Path, state: ModelState, mesh: Mesh, seed: int) -> Loaded:
    """This rank's part of `load`; it talks to no other rank."""
    where = model_folder(top)
    # Cheap checks first, on every rank: nothing is overwritten before they pass.
    if wrong := faulty_files(where):
        raise ValueError(f"{top} can't be resumed: {'; '.join(wrong[:5])}. {WAY_OUT_OF_RESUME}")
    require_one_step_unless_vouched(where)
    with torch.no_grad():
        load_flat(state.layout, mesh.shard_rank, ShardSource(where), state.params)
        updates = 0
        if state.exp_avg is not None and state.exp_avg_sq is not None:
            _require_optimizer(where)
            optim = Shards(where, "optim")
            for which, flat in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
                load_flat(state.layout, mesh.shard_rank, ShardSource(optim, which), flat)
            updates = optimizer_step(optim)
    same, extra = _extra(where, mesh)
    # Other programs' checkpoints don't say their step: their folder's name does
    named = re.fullmatch(r"global_step_(\d{1,18})(?:\.old)?", top.name)
    step = step_of(extra.pop("step", named[1] if named else updates), where)
    # Only the same ranks can go on with what they drew; others begin their own
    states = extra.pop("rng", None)
    if same and states is not None:
        _restore(states, mesh, where)
    else:
        rng.derive(seed, step, mesh.rank)
    return Loaded(extra, data_state(top), step, updates, same)


def _restore(states: Any, mesh: Mesh, where: Path) -> None:
    try:
        rng.restore(states, mesh.device)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        path = where / shard_name("extra_state", mesh.world, mesh.rank)
        raise ValueError(
            f"{path} holds no random states ({type(error).__name__}). {WAY_OUT}"
        ) from error


def _require_optimizer(folder: Path) -> None:
    name = shard_name("optim", world_size(folder), 0)
    if not (folder / name).exists():
        raise Unusable(
            f"{folder} has no {name}: it was saved without the optimizer, so training can't go on "
            "from it. Start a new run from its huggingface/ folder (model.partial_pretrain), and "
            "save with checkpoint.save_contents=[model,optimizer,extra] next time."
        )


def _extra(folder: Path, mesh: Mesh) -> tuple[bool, dict[str, Any]]:
    """(whether this layout wrote it, this rank's extra state or rank 0's).

    Empty for other programs' checkpoints.
    """
    config = read_small_json(folder / CONFIG) if written_by_us(folder) else {}
    # The same ranks with the same shards: only then do this rank's random states mean anything
    # here.
    same = config.get("world_size") == mesh.world and config.get("shards") == mesh.shards
    return same, extra_state(folder, mesh.rank if same else 0) or {}
