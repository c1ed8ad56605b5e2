"""Whether all ranks, and the checkpoint that a run goes on from, are of the same run: a plan or data of another one would not
fail, but train on something else than was asked for, or hang."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist

from retool.memory import LADDER, Choice
from retool.parallel.mesh import Mesh
from retool.sft.config import SFTConfig
from retool.sft.plan import Report, Split

NAMES = {  # as `order_of` calls them → as users do
    "samples": "training samples", "tokens": "their tokens", "trained_tokens": "their trained tokens", "shuffle": "data.shuffle",
    "seed": "data.seed", "train_batch_size": "data.train_batch_size",
}  # fmt: skip


def order_of(config: SFTConfig, data: Any) -> dict[str, int]:
    """What decides which samples step N trains on; a checkpoint keeps it. `data` has `lengths` and `trained`."""
    lengths, trained = np.asarray(data.lengths), np.asarray(data.trained)
    return {
        "samples": len(lengths), "tokens": int(lengths.sum(dtype=np.int64)), "trained_tokens": int(trained.sum(dtype=np.int64)),
        "shuffle": int(config.data.shuffle), "seed": config.data.seed, "train_batch_size": config.data.train_batch_size,
    }  # fmt: skip


def changes(before: Mapping[str, Any], now: Mapping[str, int]) -> str:
    """What of `now` is other than in `before`, in words; what `before` doesn't know isn't compared."""
    return "; ".join(f"{NAMES[key]}: then {before[key]}, now {value}" for key, value in now.items() if before.get(key, value) != value)


def agree(report: Report, mesh: Mesh) -> Report:
    """The same plan on every rank, the most careful of theirs: GPUs may differ. Collective. ValueError where ranks read other rows."""
    if mesh.world_group is None:
        return report
    mine = report.choice, fingerprint(report.train), fingerprint(report.val)
    everyone: list[Any] = [None] * mesh.world
    dist.all_gather_object(everyone, mine, group=mesh.world_group)
    for rank, (_, *read) in enumerate(everyone):
        for name, first, here in zip(("train", "val"), everyone[0][1:], read, strict=True):
            if first != here:
                raise ValueError(
                    f"data.{name}_files: rank {rank} reads other rows than rank 0 ({here[0]} samples and {first[0]}), or renders them in "
                    "another way. Every machine needs the same files and the same versions of the packages."
                )
    return replace(report, choice=most_careful([choice for choice, *_ in everyone]))


def fingerprint(split: Split | None) -> tuple[int, ...]:
    """(samples, checksums of their lengths and trained tokens)."""
    if split is None:
        return (0,)
    lengths, trained = split.dataset.lengths, split.dataset.trained
    return len(lengths), zlib.crc32(lengths.tobytes()), zlib.crc32(trained.tobytes())


def most_careful(choices: list[Choice]) -> Choice:
    """What fits on every rank."""
    return replace(
        max(choices, key=lambda choice: choice.prediction.peak),
        tokens=min(choice.tokens for choice in choices), recompute=max((choice.recompute for choice in choices), key=LADDER.index),
        hold=all(choice.hold for choice in choices),
    )  # fmt: skip
