"""Optimizer steps as a function of the step number alone.

A step has the same samples whatever the layout, and a run resumes at any of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np

from retool.batch import PackedBatch, Sample, pack, pack_apart
from retool.data.cache import Dataset, DatasetReport, open_dataset
from retool.data.packing import Packing, plan_step, shared_room, whole_shares

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

SAMPLES_A_VALIDATION_PLAN = 1024
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Samples(Protocol):
    """A data set that steps are made of: `lengths` and `trained` are int arrays [n]."""

    lengths: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one data-parallel rank.

    `micro_batches` are whole packs: slice them for a sequence-parallel rank. Every rank has equally
    many; where it has nothing to do, a dummy pack of weight 0. `samples` are the indices of all
    ranks together, `real_tokens` and `trained_tokens` count them.
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


@lru_cache(maxsize=2)  # every step asks for its epoch's; of a million samples it takes 0.1 s
def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order of an epoch, int64 [samples], read-only.

    It is the same on every machine and with every numpy.
    """
    if shuffle:
        # Sorted by random 64-bit keys: raw bit streams are what numpy promises never to change.
        keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(samples)
        order = np.argsort(keys, kind="stable")
    else:
        order = np.arange(samples)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class StepOrder:
    """Which samples a step takes: the next `train_batch_size` of an epoch, whose order `seed` makes.

    `shuffle` false: as they lie in the files.
    """

    train_batch_size: int
    seed: int
    shuffle: bool = True


def step_batch(step: int, dataset: Samples, order: StepOrder, packing: Packing) -> StepBatch:
    """The batch of global step `step` (from 0, counted over epochs) for one data-parallel rank."""
    epoch, indices = _step_samples(step, dataset, order)
    return StepBatch(
        step=step,
        epoch=epoch,
        micro_batches=_packs(dataset, indices, packing),
        samples=tuple(indices),
        real_tokens=int(np.sum(dataset.lengths[indices], dtype=np.int64)),
        trained_tokens=int(np.sum(dataset.trained[indices], dtype=np.int64)),
    )


def _step_samples(step: int, dataset: Samples, order: StepOrder) -> tuple[int, list[int]]:
    """The epoch of a step, and its samples."""
    size = order.train_batch_size
    epoch, position = divmod(step, steps_per_epoch(len(dataset), size))
    whole_epoch = epoch_order(len(dataset), order.seed, epoch, order.shuffle)
    return epoch, whole_epoch[position * size : (position + 1) * size].tolist()


def divided_share(dataset: Samples, order: StepOrder, packing: Packing, steps: int) -> float:
    """Of the micro-batches of all ranks in the first `steps` steps the share whose documents are
    divided over sp ranks, see `whole_shares`.
    """
    divided: list[bool] = []
    for step in range(steps):
        _, indices = _step_samples(step, dataset, order)
        lengths = dataset.lengths[indices].tolist()
        for rank in plan_step(lengths, packing.budget, packing.dp, packing.sp):
            for members in rank:
                own = [lengths[i] for i in members]
                divided.append(whole_shares(own, packing) is None)
    return sum(divided) / max(len(divided), 1)


def lengths_ahead(
    dataset: Samples, order: StepOrder, start_step: int, stop_step: int
) -> np.ndarray:
    """The lengths of the samples that steps start_step … stop_step - 1 take, [n] in no order; of all
    samples where these are an epoch or more.
    """
    size = order.train_batch_size
    per_epoch = steps_per_epoch(len(dataset), size)
    if stop_step - start_step >= per_epoch:
        return dataset.lengths
    taken = []
    for epoch in range(start_step // per_epoch, -(-stop_step // per_epoch)):
        first = max(start_step - epoch * per_epoch, 0)
        stop = min(stop_step - epoch * per_epoch, per_epoch)
        whole = epoch_order(len(dataset), order.seed, epoch, order.shuffle)
        taken.append(whole[first * size : stop * size])
    return dataset.lengths[np.concatenate([np.empty(0, np.int64), *taken])]


def iterate_steps(
    dataset: Samples,
    order: StepOrder,
    packing: Packing,
    *,
    stop_step: int,
    start_step: int = 0,
    prefetch: int = 2,
) -> Ahead[StepBatch]:
    """Steps start_step … stop_step - 1, over as many epochs as that takes.

    To resume, give the next step: nothing else is needed. A thread makes `prefetch` steps ahead:
    close what you don't take to the end.
    Raises ValueError when an epoch has no full batch.
    """
    steps_per_epoch(len(dataset), order.train_batch_size)

    def make(step: int) -> StepBatch:
        return step_batch(step, dataset, order, packing)

    return Ahead(make, range(start_step, stop_step), prefetch)


def iterate_validation(
    dataset: Samples, packing: Packing, *, prefetch: int = 2
) -> Iterator[PackedBatch]:
    """Every sample once over all ranks, as this rank's micro-batches.

    Every rank gets equally many, dummies of weight 0 among them. The mean loss is the sum over all
    ranks divided by `dataset.trained.sum()`.
    """

    def make(first: int) -> tuple[PackedBatch, ...]:
        last = min(first + SAMPLES_A_VALIDATION_PLAN, len(dataset))
        return _packs(dataset, range(first, last), packing)

    for packs in Ahead(make, range(0, len(dataset), SAMPLES_A_VALIDATION_PLAN), prefetch):
        yield from packs


def _packs(dataset: Samples, indices: Sequence[int], packing: Packing) -> tuple[PackedBatch, ...]:
    """The packs of one rank for the samples that all ranks take together."""
    pad_to = packing.pad_to
    # A padded sample takes as much room and time as a long one
    lengths = [pad_to if pad_to is not None else int(dataset.lengths[i]) for i in indices]
    plan = plan_step(lengths, packing.budget, packing.dp, packing.sp)
    packs = []
    for number, members in enumerate(plan[packing.dp_rank]):
        room = 0
        if packing.recorded:
            room = shared_room([[lengths[i] for i in rank[number]] for rank in plan], packing)
        # Shortest first: attention kernels that treat long and short documents apart then have two
        # runs to do, not many.
        ordered = sorted(members, key=lambda i: lengths[i])
        samples = [dataset[indices[i]] for i in ordered]
        shares = whole_shares([lengths[i] for i in ordered], packing)
        if shares is None:
            divided = pack(samples, packing.sp, pad_to, packing.pad_id)
            packs.append(replace(divided, divided=not packing.keep_whole, room=room))
        else:
            whole = [[samples[i] for i in sorted(share)] for share in shares]
            packs.append(replace(pack_apart(whole, packing.pad_id), room=room))
    return tuple(packs)


class Ahead(Iterator[_Made]):
    """`make(item)` in order; a thread of its own makes up to `prefetch` of them ahead.

    Its errors are raised by `next`. The thread ends with the last item, with an error, and with
    `close`, which waits for it. Of one that is only forgotten the thread ends by itself: garbage
    collection comes at any moment, and a wait in it may be for a lock that its own thread holds.
    """

    def __init__(
        self, make: Callable[[_Item], _Made], items: Iterable[_Item], prefetch: int
    ) -> None:
        self._make = make
        self._items = iter(items)
        self._prefetch = prefetch
        self._waiting: deque[Future[_Made]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="retool-data")

    def __next__(self) -> _Made:
        # The one that is given now, and those ahead of it
        wanted = self._prefetch + 1 - len(self._waiting)
        try:
            for item in islice(self._items, wanted):
                self._waiting.append(self._pool.submit(self._make, item))
            if self._waiting:
                return self._waiting.popleft().result()
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Give up what isn't taken, and wait for the thread. To be closed twice does no harm."""
        self._items = iter(())
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
