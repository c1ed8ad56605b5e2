"""What the supervisor's loop waits for: descriptors, each with a function to call when it can be
read.

epoll itself, without the standard library's selectors: a call comes with some ten changes of what is
waited for, and those take more time there than in the kernel.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Heard = TypeVar("Heard")


class Events(Generic[Heard]):
    """Functions by descriptor."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._listeners: dict[int, Callable[[], Heard]] = {}

    def listen(self, fd: int, listener: Callable[[], Heard], once: bool = False) -> None:
        """Call `listener` whenever there is something to read, or only the first time."""
        self._listeners[fd] = listener
        self._poll.register(fd, select.EPOLLIN | (select.EPOLLONESHOT if once else 0))

    def instead(self, fd: int, listener: Callable[[], Heard], kind: int) -> None:
        """Call another listener from now on, whenever there is what `kind` says."""
        self._listeners[fd] = listener
        self._poll.modify(fd, kind)

    def listen_for_room(self, fd: int, wanted: bool) -> None:
        """Call its listener also when it can be written to, or no longer."""
        self._poll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def forget(self, fd: int) -> None:
        """Not call its listener any more. For a descriptor that nobody listens to: nothing."""
        if self._listeners.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def forget_closed(self, fd: int) -> None:
        """The same for one that is closed, or is about to be: the kernel forgets it by itself."""
        self._listeners.pop(fd, None)

    def wait(self, seconds: float | None) -> Iterator[Callable[[], Heard]]:
        """The listeners to call now, once one of them can be called or the time is up."""
        ready = [(fd, self._listeners.get(fd)) for fd, _ in self._poll.poll(seconds)]
        for fd, listener in ready:
            # An earlier one may have ended this one's descriptor, whose number may be another's now
            if listener is not None and self._listeners.get(fd) is listener:
                yield listener
