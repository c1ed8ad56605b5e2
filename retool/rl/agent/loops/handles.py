"""What a user's loop gets: `generate` and `tools`, which lead from its thread to the run's event
loop.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from retool.rl.agent.loops.protocol import ToolAnswer, Turn
from retool.rl.agent.loops.recorder import Recorder

T = TypeVar("T")
OVER = (
    "the trajectory is over: its loop has returned, or took too long. Each trajectory has its own "
    "`generate` and `tools`; await all that you ask them for before you return."
)


class Link:
    """The way from a user's function to `loop`, where the run's own coroutines run.

    It is closed when the trajectory is over.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.is_closed = False
        self._loop = loop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._asked: list[tuple[str, Coroutine[Any, Any, Any]]] = []

    def ask(self, what: str, make: Callable[[], Coroutine[Any, Any, T]]) -> Awaitable[T]:
        """What the coroutine comes to that `make` makes."""
        if self.is_closed:
            raise RuntimeError(OVER)
        work = self._carry(make)
        self._asked.append((what, work))
        return work

    async def _carry(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        # Asked again on each side of the way: the trajectory may end while the call is between
        # threads.
        if self.is_closed:
            raise RuntimeError(OVER)
        work = self._on_run(make)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _on_run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self.is_closed:
            raise RuntimeError(OVER)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await make()
        finally:
            self._tasks.discard(task)

    def close(self) -> None:
        """The trajectory is over: what is still under way is given up."""
        self.is_closed = True
        for task in self._tasks:
            task.cancel()

    def left_over(self) -> str:
        """What was asked for and not waited for, in words; "" where there is nothing."""
        unstarted = ""
        for what, work in self._asked:
            state = inspect.getcoroutinestate(work)
            if state == inspect.CORO_CREATED:
                # Or Python would warn of a coroutine that was never awaited, with none of our
                # words.
                work.close()
                unstarted = unstarted or f"{what} wasn't awaited: write `await {what}(…)`"
            elif state != inspect.CORO_CLOSED:
                return f"it returned while {what} was still under way: await it"
        return unstarted


class Generate:
    """`await generate(messages)`: the model's turn after these messages, a text, or token ids.

    Messages that go on from a turn of the model (`turn.message`, then what answers it) follow it
    token by token, and are one sequence in training. Messages of which a turn was left out or
    changed begin another sequence. Several may be asked for at once.

    `max_tokens` limits this turn, besides the run's limits. Raises TrajectoryOver where these are
    used up, ValueError for messages that the chat template can't show.
    """

    def __init__(self, recorder: Recorder, link: Link) -> None:
        self._recorder = recorder
        self._link = link

    def __call__(
        self,
        messages: str | Sequence[Mapping[str, Any]] | Sequence[int],
        max_tokens: int | None = None,
    ) -> Awaitable[Turn]:
        recorder = self._recorder
        return self._link.ask("generate", lambda: recorder.sample(messages, max_tokens))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text: what it says of control tokens is text."""
        return self._recorder.agent.renderer.encoder.data_ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._recorder.agent.renderer.encoder.said(ids)


class Tools:
    """The run's tools, as the question's row offers them.

    What one keeps for a trajectory is opened by its first call, and closed when the loop returns. A
    tool that breaks raises, and loses the trajectory, as it does in the run's own loop.
    """

    def __init__(self, recorder: Recorder, link: Link) -> None:
        self._recorder = recorder
        self._link = link

    @property
    def names(self) -> list[str]:
        return list(self._recorder.agent.tools)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What the model is told of them."""
        return self._recorder.agent.schemas

    def call(self, name: str, arguments: Mapping[str, Any]) -> Awaitable[ToolAnswer]:
        """What the tool of that name answers; where it can't be called so, why."""
        recorder = self._recorder
        return self._link.ask("tools.call", lambda: recorder.call(name, arguments))

    def answers(self, turn: Turn) -> Awaitable[list[dict[str, Any]]]:
        """Messages with what tools answer to a turn's calls, as the run's own loop has them.

        Raises TrajectoryOver where a tool says that it is over.
        """
        recorder = self._recorder
        return self._link.ask("tools.answers", lambda: recorder.answers(turn))
