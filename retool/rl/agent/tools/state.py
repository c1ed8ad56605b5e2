"""What a tool keeps for one trajectory: opened by the first call, closed once.

A tool's code may raise anything, hang, even when it is cancelled, or exit: here that ends in a
`ToolResult`, or in a failure that is counted.
"""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpx

from retool.rl.agent.tools.protocol import StatefulTool, ToolResult
from retool.rl.reward.foreign import plain, shown, words_of

T = TypeVar("T")
CLOSE_SECONDS = 10.0  # that a tool has to close what it kept


@dataclass(frozen=True)
class Outcome:
    """What somebody's code came to: what it returned, or what it raised."""

    value: Any = None
    error: BaseException | None = None

    @property
    def reason(self) -> str:
        assert self.error is not None
        return words_of(self.error)


async def outcome_of(
    work: Coroutine[Any, Any, Any],
    seconds: float | None,
    late: Callable[[Any], None] | None = None,
) -> Outcome | None:
    """What `work` comes to within `seconds` (None: as long as it takes); None where it doesn't.

    Then it is cancelled, and left to itself where it ignores that. `late` is given what it returns
    when nobody waits for it any more.
    """
    task = asyncio.get_running_loop().create_task(_guarded(work))
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        came = task.done()
        if not came:
            if late is not None:
                task.add_done_callback(partial(_tell_late, late))
            task.cancel()
    return task.result() if came else None


def run_alone(work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to on an event loop of its own.

    `asyncio.run` waits for whatever was started there. This leaves it to itself where it ignores
    for `CLOSE_SECONDS` that it is cancelled.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(_end_others())
        loop.close()


async def _end_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CLOSE_SECONDS)
    generators = asyncio.create_task(asyncio.get_running_loop().shutdown_asyncgens())
    await asyncio.wait({generators}, timeout=CLOSE_SECONDS)


async def _guarded(work: Coroutine[Any, Any, Any]) -> Outcome:
    try:
        return Outcome(await work)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a library in it may even exit, or cancel
        return Outcome(error=error)


def _tell_late(late: Callable[[Any], None], task: asyncio.Task[Outcome]) -> None:
    if not task.cancelled() and task.exception() is None and task.result().error is None:
        late(task.result().value)


def what_raised(error: BaseException) -> ToolResult:
    """The answer of a tool that raised."""
    text = words_of(error)
    # Nobody there to be called: not the model's doing
    if isinstance(error, (ConnectionError, httpx.TransportError)):
        return ToolResult(text, "infrastructure")
    return ToolResult(text, "raised")


@dataclass
class State:
    """What `tool` keeps for one trajectory, whose question is `row`.

    `score` is what the tool gave for the whole answer, `failed_closes` counts what it didn't close.
    """

    tool: StatefulTool
    row: Mapping[str, Any]
    is_open: bool = False
    value: Any = None
    score: float | None = None
    failed_closes: int = 0
    in_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    closings: set[asyncio.Task[None]] = field(default_factory=set)

    async def call(self, arguments: Mapping[str, Any], timeout: float) -> ToolResult:
        """What the tool answers, within `timeout` seconds if it doesn't keep time itself.

        Calls come one after the other. What is kept is closed after one that was given up: nobody
        knows how far it got.
        """
        seconds = None if getattr(self.tool, "keeps_time", False) else timeout
        async with self.in_turn:
            refused = None if self.is_open else await self._open(seconds)
            if refused is not None:
                return refused
            outcome = await outcome_of(self.tool.call_state(self.value, arguments), seconds)
            if outcome is None:
                self.begin_close()
                text = (
                    f"TimeoutError: {self.tool.name} gave no answer within {timeout:g} s. What it had "
                    "kept is lost, and the next call begins anew."
                )
                return ToolResult(text, "timeout", timeout)
        if outcome.error is not None:
            return what_raised(outcome.error)
        if not isinstance(outcome.value, ToolResult):
            kind = type(outcome.value).__name__
            text = f"TypeError: {self.tool.name} answered with a {kind}, not a ToolResult"
            return ToolResult(text, "raised")
        return outcome.value

    async def _open(self, seconds: float | None) -> ToolResult | None:
        """Have the tool make its state; why it didn't, or None."""
        # One that is given up may still make a state: it is closed as soon as it does
        outcome = await outcome_of(self.tool.open_state(self.row), seconds, self._begin_close_of)
        if outcome is None:
            return ToolResult(f"it didn't open within {seconds:g} s", "not_opened")
        if outcome.error is not None:
            return ToolResult(f"it didn't open: {outcome.reason}", "not_opened")
        self.value = outcome.value
        self.is_open = True
        return None

    def begin_close(self) -> None:
        """Have the tool close its state, if it is open. `closings` are done within CLOSE_SECONDS,
        whoever waits for them or is cancelled meanwhile.
        """
        if self.is_open:
            self.is_open = False
            self._begin_close_of(self.value)
            self.value = None

    def _begin_close_of(self, value: Any) -> None:
        self.closings.add(asyncio.get_running_loop().create_task(self._close(value)))

    async def _close(self, value: Any) -> None:
        outcome = await outcome_of(self.tool.close_state(value), CLOSE_SECONDS)
        if outcome is None:
            self._failed_to_close(f"it took longer than {CLOSE_SECONDS:g} s")
        elif outcome.error is not None:
            self._failed_to_close(outcome.reason)
        elif outcome.value is not None:
            self._add_score(outcome.value)

    def _add_score(self, score: Any) -> None:
        number = plain(score)
        if isinstance(number, (int, float)) and math.isfinite(number):
            self.score = (self.score or 0.0) + float(number)
        else:
            self._failed_to_close(f"it gave {shown(score)} for the answer, not a finite number")

    def _failed_to_close(self, reason: str) -> None:
        self.failed_closes += 1
        warnings.warn(
            f"the tool {self.tool.name} did not close what it kept for an answer: {reason}. Such are "
            "counted (tool/failed_closes).",
            stacklevel=1,
        )
