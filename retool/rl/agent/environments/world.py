"""The environment of one trajectory: every call has a time limit, and every environment is closed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from retool.data.read.user_function import place_of
from retool.rl.agent.environments.protocol import (
    Answer,
    EnvironmentFailure,
    Opening,
    read_answer,
    read_opening,
    read_reward,
)
from retool.rl.agent.work_thread import WorkThread
from retool.rl.reward.foreign import shown, words_of

T = TypeVar("T")
CLOSE_SECONDS = 30.0  # that an environment has to close


class World:
    """The object that `make` makes, from its `reset` to its `close`.

    A coroutine is awaited; anything else runs on a thread of the world's own, the same for all of
    its calls, so that it may keep what belongs to one (a connection of sqlite's). What takes longer
    than `seconds` is given up, unless `make.keeps_time`: it has a queue, which isn't the world's
    time, and limits each call itself. Raises EnvironmentFailure for whatever goes wrong.
    """

    def __init__(self, make: Callable[[], Any], seconds: float) -> None:
        self._make = make
        self._seconds = None if getattr(make, "keeps_time", False) else seconds
        self._thread = WorkThread()
        self._made: Any = None
        self._closed = False
        self.done = False  # it said so

    async def reset(self, row: Mapping[str, Any]) -> Opening:
        """Make the object, and have it begin."""
        return await self._within("reset", self._begin(row), read_opening)

    async def step(self, message: Mapping[str, Any]) -> Answer:
        """The environment's answer to a turn of the model."""
        answer = await self._within("step", self._run(self._made.step, message), read_answer)
        self.done = answer.done
        return answer

    async def cut(self, message: Mapping[str, Any] | None) -> float:
        """The environment's reward for a trajectory that ends here, if it wants to be told of that."""
        cut = getattr(self._made, "cut", None)
        if cut is None:
            return 0.0
        return await self._within("cut", self._run(cut, message), read_reward)

    async def close(self) -> str:
        """Close the environment, unless it is closed already. Returns what went wrong, or ""."""
        if self._closed:
            return ""
        self._closed = True
        close = getattr(self._made, "close", None)
        try:
            if close is not None:
                await self._within("close", self._run(close), lambda given: None)
        except EnvironmentFailure as error:
            return str(error)
        finally:
            self._thread.end()
        return ""

    async def _begin(self, row: Mapping[str, Any]) -> Any:
        if _wants_the_loop(self._make):
            made = self._make()
            self._take(await made if inspect.isawaitable(made) else made)
            return await self._run(self._made.reset, row)
        value = await self._thread.run(lambda: self._make_and_reset(row))
        return await value if inspect.isawaitable(value) else value

    def _make_and_reset(self, row: Mapping[str, Any]) -> Any:
        """Both at once: each way to the thread and back costs the event loop time."""
        self._take(self._make())
        return self._made.reset(row)

    def _take(self, made: Any) -> None:
        missing = [part for part in ("reset", "step") if not callable(getattr(made, part, None))]
        if missing:
            raise TypeError(
                f"what should make an environment gave {shown(made)}, which has no "
                f"{' and no '.join(missing)}"
            )
        self._made = made

    async def _run(self, method: Callable[..., Any], *given: Any) -> Any:
        if inspect.iscoroutinefunction(method):
            return await method(*given)
        value = await self._thread.run(lambda: method(*given))
        return await value if inspect.isawaitable(value) else value

    async def _within(
        self, what: str, work: Coroutine[Any, Any, Any], read: Callable[[Any], T]
    ) -> T:
        """What `work` gives, read by `read`."""
        seconds = self._seconds
        if seconds is not None and what == "close":
            seconds = min(seconds, CLOSE_SECONDS)
        task = asyncio.create_task(_outcome(work))
        try:
            await asyncio.wait({task}, timeout=seconds)
            if not task.done():
                self._leave_thread()
                raise EnvironmentFailure(f"environment.{what} gave no answer within {seconds:g} s.")
        finally:
            task.cancel()
        value, error = task.result()
        if error is not None:
            told = words_of(error) + place_of(error)
            raise EnvironmentFailure(f"environment.{what}: {told}") from error
        try:
            return read(value)
        except ValueError as problem:
            raise EnvironmentFailure(f"environment.{what}: {problem}") from problem
        except Exception as other:  # of an object of somebody's, when it is looked at
            told = f"what it returned can't be read: {words_of(other)}"
            raise EnvironmentFailure(f"environment.{what}: {told}") from other

    def _leave_thread(self) -> None:
        """What hangs is left to itself: what is still to be called has another thread."""
        self._thread.end()
        self._thread = WorkThread()


def _wants_the_loop(make: Callable[..., Any]) -> bool:
    """Whether an object is made where it is awaited later: on the event loop's thread."""
    parts = [make, getattr(make, "reset", None), getattr(make, "step", None)]
    return any(map(inspect.iscoroutinefunction, parts))


async def _outcome(work: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
    """(what `work` gives, what it raises): a library in it may even exit, or cancel."""
    try:
        return await work, None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, error
