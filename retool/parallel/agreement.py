"""All ranks go on, or none does: what fails on one rank is told to all before they meet in the next
exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from retool.parallel.lost_peer import lost_peer

T = TypeVar("T")


class GivenUp(Exception):
    """Work that all ranks have agreed to give up, and why."""


def describe(error: BaseException) -> str:
    """An error in one line."""
    if lost_peer(error):
        return "another rank is gone"
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")


def all_or_none(rank: int, group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """This rank's `action()`, which must not talk to other ranks, once all ranks of `group` (gloo)
    are through with theirs.

    A collective call. GivenUp, on all of them, where one raised: with every failed rank's error.
    """
    value = None
    error = None
    try:
        value = action()
    except Exception as failure:
        error = f"rank {rank}: {describe(failure)}"
    failed = [each for each in _everyones(error, group) if each is not None]
    if failed:
        raise GivenUp("; ".join(failed))
    return value  # pyright: ignore[reportReturnType]


def _everyones(error: str | None, group: dist.ProcessGroup | None) -> list[Any]:
    """All ranks' errors. Texts are exchanged only where there is one."""
    if group is None:
        return [error]
    failures = torch.tensor(int(error is not None))
    dist.all_reduce(failures, group=group)
    if not failures:
        return []
    errors: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    return errors


def from_first_rank(rank: int, group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """What rank 0's `action()` returned, on every rank.

    A collective call. GivenUp, on all of them, where it raised.
    """
    value: list[Any] = [all_or_none(rank, group, lambda: action() if rank == 0 else None)]
    if group is not None:
        dist.broadcast_object_list(value, src=0, group=group, device=torch.device("cpu"))
    return value[0]
