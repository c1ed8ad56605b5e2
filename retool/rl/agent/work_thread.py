"""A thread for code that isn't a coroutine and may hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

from retool.rl.agent.tools.on_thread import outcome_of, settle

T = TypeVar("T")
Job = Callable[[], None]


class WorkThread:
    """Runs calls one after the other on a thread, which is started by the first.

    Nobody waits for it: it ends with the program, or after `end` and the calls before that.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._started = False

    async def run(self, call: Callable[[], T]) -> T:
        """What `call` gives, or raises."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            outcome = outcome_of(call)
            if not loop.is_closed():  # nobody waits any more
                loop.call_soon_threadsafe(settle, answer, *outcome)

        self._jobs.put(job)
        if not self._started:
            self._started = True
            threading.Thread(target=self._work, name="retool-work", daemon=True).start()
        return await answer

    def end(self) -> None:
        """No more calls come."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
