"""One trajectory, played by a user's loop: on a thread and with a time limit, whatever it does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retool.data.read.user_function import place_of
from retool.rl.agent.environments.play import Attempt
from retool.rl.agent.loop import Generate
from retool.rl.agent.loops.handles import Generate as Asks
from retool.rl.agent.loops.handles import Link, Tools
from retool.rl.agent.loops.protocol import LoopFailure, TrajectoryOver
from retool.rl.agent.loops.recorder import Recorder
from retool.rl.agent.loops.threads import LoopThreads
from retool.rl.agent.options import Agent
from retool.rl.agent.states import close_states
from retool.rl.reward.foreign import words_of
from retool.rl.types import Stop, Trajectory

Function = Callable[..., Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class OwnLoop:
    """The user's `function`, called `name`, which has `seconds` for a trajectory. A context has at
    most `most_tokens`.
    """

    function: Function
    name: str
    seconds: float
    most_tokens: int
    threads: LoopThreads = field(default_factory=LoopThreads)


async def run_own_loop(
    attempt: Attempt,
    begin: Callable[[int, Sequence[int]], Generate],
    agent: Agent,
    own: OwnLoop,
) -> Trajectory:
    """One trajectory. `begin` is told of each context that the loop begins.

    The function may fail in any way: the trajectory is lost then. Only `begin` and what it gives
    raise.
    """
    recorder = Recorder(attempt, agent, begin, own.most_tokens)
    link = Link(asyncio.get_running_loop())
    stop = Stop.INFRASTRUCTURE
    try:
        stop = await _played(recorder, link, own)
    except LoopFailure as error:
        recorder.failure = recorder.failure or f"agent.{own.name}: {error}"
    finally:
        link.close()
        await close_states(recorder.episode)
    # Raised although the function may have caught it: without its engine the run can't go on.
    if recorder.error is not None:
        raise recorder.error
    return recorder.finish(stop)


async def _played(recorder: Recorder, link: Link, own: OwnLoop) -> Stop:
    """Why the trajectory ends. LoopFailure for whatever goes wrong."""
    row = recorder.attempt.row()
    generate = Asks(recorder, link)
    tools = Tools(recorder, link)
    work = await own.threads.run(lambda: _outcome(own.function, row, generate, tools), own.seconds)
    if not work.done() or work.cancelled():
        raise LoopFailure(
            f"it didn't return within {own.seconds:g} s (rollout.agent.timeout_seconds)"
        )
    returned, error = work.result()
    left_over = link.left_over()
    if isinstance(error, TrajectoryOver):
        return error.stop
    if error is not None:
        told = words_of(error) + place_of(error)
        raise LoopFailure(f"{left_over}. {told}" if left_over else told) from error
    if left_over:
        raise LoopFailure(left_over)
    return recorder.end(returned)


async def _outcome(
    function: Function, row: Mapping[str, Any], generate: Asks, tools: Tools
) -> tuple[Any, BaseException | None]:
    """(what the function returns, what it raises): a library in it may even exit, or cancel."""
    try:
        return await function(row, generate, tools), None
    except BaseException as error:
        return None, error
