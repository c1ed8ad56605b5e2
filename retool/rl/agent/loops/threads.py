"""Threads for users' loops. One that blocks doesn't hold up the engine nor, in most cases, the
others.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

MOST_THREADS = 64  # of a process that nothing blocks; with more trajectories several share one
SECONDS_TO_ANSWER = 1.0  # that a thread has to show that nothing blocks it


class LoopThread:
    """A thread with an event loop of its own, on which coroutines run."""

    def __init__(self) -> None:
        self.running = 0  # coroutines that somebody waits for
        self._asked: Future[None] | None = None  # whether it gets to anything
        self._loop = asyncio.new_event_loop()
        self._ends = False
        threading.Thread(target=self._work, name="retool-loop", daemon=True).start()

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        """What `work` comes to, for the event loop that asks."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def ask(self) -> Future[None]:
        """Have it show that it gets to anything: a coroutine may block it."""
        # A loop that a coroutine blocks runs nothing else, however small: that is the test.
        self._asked = asyncio.run_coroutine_threadsafe(_nothing(), self._loop)
        return self._asked

    @property
    def is_blocked(self) -> bool:
        """Whether it was asked, and hasn't got to that."""
        return self._asked is not None and not self._asked.done()

    async def answers(self) -> bool:
        """Whether it gets to anything now."""
        answer = asyncio.wrap_future(self.ask())
        await asyncio.wait({answer}, timeout=SECONDS_TO_ANSWER)
        return not self.is_blocked

    def end(self) -> None:
        """It ends, as soon as nothing blocks it. To be ended twice does no harm."""
        if self._ends:
            return
        self._ends = True
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _work(self) -> None:
        while not self._ends:
            # A task that somebody's code started may exit: that ends the event loop's run
            with contextlib.suppress(BaseException):
                self._loop.run_forever()
        # What still runs cleans up, and what hasn't begun never does
        others = asyncio.all_tasks(self._loop)
        for task in others:
            task.cancel()
        if others:
            with contextlib.suppress(BaseException):
                self._loop.run_until_complete(asyncio.wait(others, timeout=SECONDS_TO_ANSWER))
        self._loop.close()


async def _nothing() -> None:
    """What a thread shows with that it goes on."""


class LoopThreads:
    """The threads of a run. They are started when they are needed, and end with it."""

    def __init__(self) -> None:
        self._threads: list[LoopThread] = []

    async def run(
        self, make: Callable[[], Coroutine[Any, Any, Any]], seconds: float
    ) -> asyncio.Future[Any]:
        """Have the coroutine run that `make` makes. What comes back is done, or was given up after
        `seconds`: then it is cancelled, and left to itself where it ignores that.
        """
        thread = self._least_busy()
        thread.running += 1
        work = thread.start(make())
        try:
            await asyncio.wait({work}, timeout=seconds)
            if not work.done():
                work.cancel()
                await self._leave_if_blocked(thread)
            return work
        except asyncio.CancelledError:
            # Nobody waits to see whether it blocks its thread: the next ones look
            work.cancel()
            thread.ask()
            raise
        finally:
            work.cancel()
            thread.running -= 1
            if thread not in self._threads and not thread.running:
                thread.end()

    def end(self) -> None:
        for thread in self._threads:
            thread.end()
        self._threads.clear()

    def _least_busy(self) -> LoopThread:
        free = [thread for thread in self._threads if not thread.is_blocked]
        idle = next((thread for thread in free if not thread.running), None)
        if idle is not None:
            return idle
        if len(free) < MOST_THREADS:
            self._threads.append(LoopThread())
            return self._threads[-1]
        return min(free, key=lambda thread: thread.running)

    async def _leave_if_blocked(self, thread: LoopThread) -> None:
        """Nothing more is begun on a thread that doesn't come to anything. It ends with the last that
        runs there: what blocks it may be over.
        """
        blocked = not await thread.answers()
        if blocked and thread in self._threads:
            self._threads.remove(thread)
