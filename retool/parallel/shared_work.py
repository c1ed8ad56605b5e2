"""Work that all ranks of a group do together: the first one says what to do, the others follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from retool.parallel.lost_peer import lost_peer

M = TypeVar("M")
R = TypeVar("R")


class GroupTorn(RuntimeError):
    """A rank failed at work that it shares with others, which wait for it in a collective.

    Nothing brings them together again, so whoever catches this must end its process: that ends the
    others, by their connections or by the launcher. What the rank raised is the cause.
    """


@dataclass(frozen=True)
class SharedWork:
    """Work of every rank of `group`, which the first one says; None is a group of one.

    A message says what is to be done next. It is picklable, and never None.
    """

    group: dist.ProcessGroup | None

    def do(self, work: Callable[[M], R], message: M) -> R:
        """The first rank: do it, as all the others do now. GroupTorn where it fails, unless there
        are no others.
        """
        if self.group is None:
            return work(message)
        self._broadcast(message)
        return self._do_or_tear(work, message)

    def follow(self, work: Callable[[Any], Any]) -> None:
        """The other ranks: do what the first one does, until it calls `end`. GroupTorn likewise."""
        while (message := self._broadcast(None)) is not None:
            self._do_or_tear(work, message)

    def end(self) -> None:
        """The first rank: let the others return from `follow`."""
        if self.group is not None:
            self._broadcast(None)

    def _do_or_tear(self, work: Callable[[M], R], message: M) -> R:
        try:
            return work(message)
        except Exception as error:
            # Who only lost another rank isn't the one that failed
            if lost_peer(error):
                raise
            raise GroupTorn(
                f"rank {dist.get_rank()} failed at work that {dist.get_world_size(self.group)} ranks "
                f"share, so none of them can go on: {type(error).__name__}: {error}"
            ) from error

    def _broadcast(self, message: Any) -> Any:
        """The first rank's message, on every rank."""
        box = [message]
        device = torch.device("cpu")
        dist.broadcast_object_list(box, group=self.group, group_src=0, device=device)
        return box[0]
