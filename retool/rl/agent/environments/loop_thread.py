"""An event loop on a thread of its own, for a library that must not hold up the engine's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines on another thread's event loop. It is started by the first, and ends with the
    program or with `end`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, or raises, there; it is cancelled if this is."""
        there = asyncio.run_coroutine_threadsafe(work, self._started())
        return await asyncio.wrap_future(there)

    def wait(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """The same, for code that isn't a coroutine. TimeoutError after `seconds`."""
        return asyncio.run_coroutine_threadsafe(work, self._started()).result(seconds)

    def end(self) -> None:
        """Stop the loop; what still runs there is left as it is."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    @property
    def started(self) -> bool:
        return self._loop is not None

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(self._loop,), name=self._name, daemon=True).start()
        return self._loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
