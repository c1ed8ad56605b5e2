"""Who judges: processes that can be killed (`reward_pool`), or, when asked, an async function in
the run's own process.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from typing import Any

from retool.rl.config import RewardConfig
from retool.rl.reward.judging import Asked, Judged, Judges, Raised, asked_of, insistently, raised
from retool.rl.reward.pool import RewardPool
from retool.rl.reward.rewards import RewardSource, checked
from retool.rl.types import FAILURE, Trajectory


class ConcurrentJudge:
    """An async reward function, awaited in the run's own process, `most` calls at once: for judges
    that are somewhere else.

    It has the run's network and environment. What it doesn't await holds up the sampling; no memory
    limit applies, and a call that takes too long is cancelled, not killed.
    """

    def __init__(self, source: RewardSource, most: int, timeout: float, floor: float) -> None:
        self._function = source.load()
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

    async def judge(self, trajectory: Trajectory) -> Judged:
        """The score of a finished trajectory; the floor where the function raises, returns no
        finite number, or takes too long.
        """
        return await self.score(asked_of(trajectory))

    async def score(self, asked: Asked, timeout: float | None = None) -> Judged:
        """What the function says to one call, within `timeout` seconds (None: its own) from when
        its turn comes.
        """
        return await insistently(lambda: self._attempt(asked, timeout or self._timeout))

    async def _attempt(self, asked: Asked, timeout: float) -> Judged:
        async with self._gate():
            work = asyncio.get_running_loop().create_task(self._call(asked))
            try:
                await asyncio.wait([work], timeout=timeout)
                found = work.result() if work.done() else None
            finally:
                work.cancel()
        if found is None:
            reason = f"no score within {timeout:g} s"
            return Judged(self._floor, {FAILURE: reason}, "timeout", reason)
        return found.judged(self._floor) if isinstance(found, Raised) else Judged(*found)

    async def _call(self, asked: Asked) -> tuple[float, dict[str, Any]] | Raised:
        """The function's answer.

        Whatever it raises is its answer too: an exit would end the event loop, and the run with it.
        """
        try:
            extra = dict(asked.extra)
            answer = await self._function(
                data_source=asked.data_source,
                solution_str=asked.solution,
                ground_truth=asked.truth,
                extra_info=extra,
            )
            return checked(answer)
        except BaseException as error:
            return raised(error)

    def _gate(self) -> asyncio.Semaphore:
        """Belongs to one event loop; another starts a new one."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._open = asyncio.Semaphore(self._most)
        return self._open

    def close(self) -> None:
        """There is nothing to end."""


def open_judges(source: RewardSource, settings: RewardConfig, workers: int | None = None) -> Judges:
    """As configured; `workers` processes, where it is processes and not as many as configured.

    ValueError where that can't be.
    """
    if settings.concurrent:
        return ConcurrentJudge(
            source, settings.max_concurrent, settings.timeout_seconds, settings.floor
        )
    return RewardPool(
        source,
        workers or settings.num_workers,
        settings.timeout_seconds,
        settings.memory_mb,
        settings.floor,
        settings.network,
        named_variables(settings),
    )


def named_variables(settings: RewardConfig) -> dict[str, str]:
    """The environment variables that reward workers get besides the harmless ones.

    ValueError where one isn't set.
    """
    missing = [name for name in settings.environment if name not in os.environ]
    if missing:
        lacking = ", ".join(missing)
        raise ValueError(
            f"reward_model.environment names {lacking}, which the run's environment lacks: set it, "
            "or don't name it."
        )
    return {name: os.environ[name] for name in settings.environment}
