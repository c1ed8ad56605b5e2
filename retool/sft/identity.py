"""Whether all ranks, and the checkpoint that a run goes on from, are of the same run: a plan or data of another one would not
fail, but train on something else than was asked for, or hang."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

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


def fingerprints(report: Report) -> dict[str, tuple[int, ...]]:
    """What this rank's files hold: (samples, checksums of their lengths and trained tokens)."""

    def of(split: Split | None) -> tuple[int, ...]:
        if split is None:
            return (0,)
        lengths, trained = split.dataset.lengths, split.dataset.trained
        return len(lengths), zlib.crc32(lengths.tobytes()), zlib.crc32(trained.tobytes())

    return {"data.train_files": of(report.train), "data.val_files": of(report.val)}
