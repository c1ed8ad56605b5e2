"""All ranks go on, or none does: what fails on one rank is told to all before they meet in the next
exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from retool.parallel.lost import lost_peer

T = TypeVar("T")


class Failed(Exception):
    """A save that all ranks have agreed to give up, and why."""


def describe(error: BaseException) -> str:
    """An error in one line."""
    if lost_peer(error):
        return "another rank is gone"
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def agreed(rank: int, group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """This rank's `action()`, which must not talk to other ranks, once all ranks of `group` (gloo)
    are through with theirs.

    A collective call. Failed, on all of them, where one raised: with every failed rank's error.
    """
    value = None
    error = None
    try:
        value = action()
    except Exception as failure:
        error = f"rank {rank}: {describe(failure)}"
    errors: list[Any] = [error]
    if group is not None:
        failures = torch.tensor(int(error is not None))
        dist.all_reduce(failures, group=group)
        if failures:
            errors = [None] * dist.get_world_size(group)
            dist.all_gather_object(errors, error, group=group)
    if failed := [e for e in errors if e is not None]:
        raise Failed("; ".join(failed))
    return value  # pyright: ignore[reportReturnType]


def shared(rank: int, group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """What rank 0's `action()` returned, on every rank.

    Collective; Failed, on all of them, where it raised.
    """
    value: list[Any] = [agreed(rank, group, lambda: action() if rank == 0 else None)]
    if group is not None:
        dist.broadcast_object_list(value, src=0, group=group, device=torch.device("cpu"))
    return value[0]
