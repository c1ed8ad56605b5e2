"""Optimizer steps, as a function of the step number alone: same samples in the same step whatever
the layout, resumable anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from retool.batch import PackedBatch, Sample, pack
from retool.data.cache import Dataset, DatasetReport, open_dataset
from retool.data.packing import QUADRATIC_LENGTH, plan_step

__all__ = [
    "Dataset",
    "DatasetReport",
    "Samples",
    "StepBatch",
    "epoch_order",
    "iterate_steps",
    "iterate_validation",
    "open_dataset",
    "step_batch",
    "steps_per_epoch",
]

VALIDATION_WINDOW = 1024
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Samples(Protocol):
    """What can be iterated: `lengths` and `trained` are int arrays [n]."""

    lengths: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one data-parallel rank.

    `micro_batches` are whole packs (slice them for a sequence-parallel rank), equally many on every
    rank, a dummy pack of weight 0 where this rank has nothing. `real_tokens`, `trained_tokens` and
    `samples` count all ranks together.
    """

    step: int
    epoch: int
    micro_batches: tuple[PackedBatch, ...]
    samples: tuple[int, ...]
    real_tokens: int
    trained_tokens: int


def steps_per_epoch(samples: int, train_batch_size: int) -> int:
    """Full batches in an epoch; the incomplete one at its end is dropped.

    Raises ValueError when there is none.
    """
    if train_batch_size < 1:
        raise ValueError(f"data.train_batch_size={train_batch_size} must be at least 1.")
    if samples < train_batch_size:
        raise ValueError(
            f"data.train_batch_size={train_batch_size} is more than the {samples} training samples: "
            f"an epoch has no full batch. Use at most {samples}."
        )
    return samples // train_batch_size


def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order of an epoch, int64 [samples]: a function of these arguments alone, on every machine
    and numpy.

    Samples are sorted by random 64-bit keys; raw bit streams are what numpy promises never to
    change.
    """
    if not shuffle:
        return np.arange(samples)
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(samples)
    return np.argsort(keys, kind="stable")


def _packs(
    dataset: Samples,
    indices: Sequence[int],
    dp_rank: int,
    dp: int,
    sp: int,
    micro_batch_size: int | None,
    max_tokens_per_gpu: int | None,
    quadratic_length: int,
    pad_to: int | None,
    pad_id: int,
) -> tuple[PackedBatch, ...]:
    lengths = [pad_to if pad_to is not None else int(dataset.lengths[i]) for i in indices]
    plan = plan_step(lengths, dp, sp, micro_batch_size, max_tokens_per_gpu, quadratic_length)
    # shortest first: attention kernels that treat long and short documents apart then have two runs
    # to do, not many
    ordered = (sorted(members, key=lambda i: lengths[i]) for members in plan[dp_rank])
    return tuple(
        pack([dataset[indices[i]] for i in members], sp, pad_to, pad_id) for members in ordered
    )


def step_batch(
    step: int,
    dataset: Samples,
    *,
    train_batch_size: int,
    seed: int,
    dp_rank: int = 0,
    dp: int = 1,
    sp: int = 1,
    micro_batch_size: int | None = None,
    max_tokens_per_gpu: int | None = None,
    quadratic_length: int = QUADRATIC_LENGTH,
    pad_to: int | None = None,
    pad_id: int = 0,
    shuffle: bool = True,
) -> StepBatch:
    """The batch of global step `step` (from 0, counted over epochs) for one data-parallel rank."""
    epoch, position = divmod(step, steps_per_epoch(len(dataset), train_batch_size))
    order = epoch_order(len(dataset), seed, epoch, shuffle)
    indices = order[position * train_batch_size : (position + 1) * train_batch_size].tolist()
    packs = _packs(
        dataset,
        indices,
        dp_rank,
        dp,
        sp,
        micro_batch_size,
        max_tokens_per_gpu,
        quadratic_length,
        pad_to,
        pad_id,
    )
    real = int(np.sum(dataset.lengths[indices], dtype=np.int64))
    trained = int(np.sum(dataset.trained[indices], dtype=np.int64))
    return StepBatch(step, epoch, packs, tuple(indices), real, trained)


def iterate_steps(
    dataset: Samples,
    *,
    train_batch_size: int,
    seed: int,
    stop_step: int,
    start_step: int = 0,
    dp_rank: int = 0,
    dp: int = 1,
    sp: int = 1,
    micro_batch_size: int | None = None,
    max_tokens_per_gpu: int | None = None,
    quadratic_length: int = QUADRATIC_LENGTH,
    pad_to: int | None = None,
    pad_id: int = 0,
    shuffle: bool = True,
    prefetch: int = 2,
) -> Iterator[StepBatch]:
    """Steps start_step … stop_step - 1, over as many epochs as that takes; `prefetch` of them are
    made ahead in a thread.

    To resume, give the next step: nothing else is needed. `micro_batch_size` or
    `max_tokens_per_gpu` as in `plan_step`; `pad_to` pads every sample to that length first. Raises
    ValueError when an epoch has no full batch.
    """
    steps_per_epoch(len(dataset), train_batch_size)
    make = partial(
        step_batch,
        dataset=dataset,
        train_batch_size=train_batch_size,
        seed=seed,
        dp_rank=dp_rank,
        dp=dp,
        sp=sp,
        micro_batch_size=micro_batch_size,
        max_tokens_per_gpu=max_tokens_per_gpu,
        quadratic_length=quadratic_length,
        pad_to=pad_to,
        pad_id=pad_id,
        shuffle=shuffle,
    )
    return _ahead(make, range(start_step, stop_step), prefetch)


def iterate_validation(
    dataset: Samples,
    *,
    dp_rank: int = 0,
    dp: int = 1,
    sp: int = 1,
    micro_batch_size: int | None = None,
    max_tokens_per_gpu: int | None = None,
    quadratic_length: int = QUADRATIC_LENGTH,
    pad_to: int | None = None,
    pad_id: int = 0,
    prefetch: int = 2,
) -> Iterator[PackedBatch]:
    """Every sample once over all ranks, as this rank's micro-batches; equally many (dummies of
    weight 0 among them) on every rank.

    The mean loss is the sum over all ranks divided by `dataset.trained.sum()`.
    """

    def make(first: int) -> tuple[PackedBatch, ...]:
        window = list(range(first, min(first + VALIDATION_WINDOW, len(dataset))))
        return _packs(
            dataset,
            window,
            dp_rank,
            dp,
            sp,
            micro_batch_size,
            max_tokens_per_gpu,
            quadratic_length,
            pad_to,
            pad_id,
        )

    for packs in _ahead(make, range(0, len(dataset), VALIDATION_WINDOW), prefetch):
        yield from packs


def _ahead(
    make: Callable[[_Item], _Made], items: Iterable[_Item], prefetch: int
) -> Iterator[_Made]:
    """`make(item)` in order, up to `prefetch` of them ahead in a background thread; its errors are
    raised here.
    """
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="retool-data")
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
