"""Judging in the run's own process: an async reward function that asks somebody else."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from retool.rl.reward.calling import Asked, seen_by
from retool.rl.reward.foreign import own_copy
from retool.rl.reward.protocol import Judged, Raised, retry_while_lost
from retool.rl.reward.score import check_score
from retool.rl.reward.source import RewardSource
from retool.rl.types import FAILURE


class AsyncJudge:
    """An async reward function, awaited in the run's own process, `most` calls at once: for judges
    that are somewhere else.

    It has the run's network and environment. What it doesn't await holds up the sampling; no memory
    limit applies, and a call that takes too long is cancelled, not killed.
    """

    def __init__(self, source: RewardSource, most: int, timeout: float, floor: float) -> None:
        self._function = source.load()
        self.seen = seen_by(self._function)
        if not inspect.iscoroutinefunction(self._function):
            raise ValueError(
                f"reward_model.concurrent=true needs an async function, and {source.name} is none: "
                f"write 'async def {source.name}' and await in it what takes time, or leave the key "
                "out (reward_model.network=true gives the judging processes the network)."
            )
        self._most = most
        self._timeout = timeout
        self._floor = floor
        self._loop: asyncio.AbstractEventLoop | None = None

    def problem(self) -> str:
        return ""

    async def score(self, asked: Asked, timeout: float | None = None) -> Judged:
        """What the function says to one call, within `timeout` seconds (None: its own) from when
        its turn comes.
        """
        return await retry_while_lost(lambda: self._attempt(asked, timeout or self._timeout))

    async def _attempt(self, asked: Asked, timeout: float) -> Judged:
        async with self._gate():
            work = asyncio.get_running_loop().create_task(self._call(asked))
            try:
                await asyncio.wait([work], timeout=timeout)
                answer = work.result() if work.done() else None
            finally:
                work.cancel()
        if answer is None:
            reason = f"no score within {timeout:g} s"
            return Judged(self._floor, {FAILURE: reason}, "timeout", reason)
        if isinstance(answer, Raised):
            return answer.judged(self._floor)
        return Judged(*answer)

    async def _call(self, asked: Asked) -> tuple[float, dict[str, Any]] | Raised:
        """The function's answer.

        Whatever it raises is its answer too: an exit would end the event loop, and the run with it.
        """
        try:
            # A function in a process of its own may change what it is given; this one may, too
            given = own_copy(asked.arguments())
            return check_score(await self._function(**given))
        except BaseException as error:
            return Raised.by(error)

    def _gate(self) -> asyncio.Semaphore:
        """Belongs to one event loop; another starts a new one."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._semaphore = asyncio.Semaphore(self._most)
        return self._semaphore

    def close(self) -> None:
        """There is nothing to end."""
