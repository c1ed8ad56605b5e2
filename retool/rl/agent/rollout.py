"""Sampling trajectories: every episode is a coroutine, the engine decodes whatever is ready while
tools and judges run.

One event loop serves the whole run, so that tools may keep connections. It alternates between one
engine step and whatever became ready meanwhile; a straggler's tool never holds the engine up while
others have tokens to make.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from retool.data.render.renderer import Renderer
from retool.engine.types import SamplingParams, TurnDone
from retool.rl.agent.episode import Sampled
from retool.rl.agent.loop import run_episode
from retool.rl.agent.options import Agent, AgentOptions
from retool.rl.agent.tools.protocol import Tool
from retool.rl.reward.builtin import overlong_penalty
from retool.rl.reward.protocol import JUDGES_LOST, Judged
from retool.rl.types import LOST, TOOL_FAILURE, Prompt, Scored, Stop, Trajectory

# of the event loop between engine steps: in so many a finished turn's call is on its way, and a
# tool's answer in the engine
ROUNDS = 3


class Engine(Protocol):
    """What a rollout needs of an engine; `retool.engine.Engine` has it."""

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None: ...
    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None: ...
    def drop(self, key: Hashable) -> None: ...
    def step(self) -> list[TurnDone]: ...
    def idle(self) -> bool: ...


class Judge(Protocol):
    """Scores a finished trajectory."""

    async def judge(self, trajectory: Trajectory, /) -> Judged: ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `seed` is the run's, `split` 0 in training and 1 in validation: the
    draws of a trajectory are a function of (seed, split, step, prompt, sample) alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int = 0
    split: int = 0


@dataclass(frozen=True)
class Overlong:
    """DAPO's length shaping; see `rewards.overlong_penalty`."""

    buffer: int
    factor: float


@dataclass(frozen=True)
class RolloutParts:
    """What a rollout is made of, the same for every one."""

    engine: Engine
    judge: Judge
    tools: Mapping[str, Tool]
    renderer: Renderer
    agent: AgentOptions
    overlong: Overlong | None = None
    stopped: Callable[[], bool] = lambda: False  # asked between engine steps


@dataclass
class RolloutTimes:
    """Seconds of a rollout: in all, and of those waiting for tools or judges with nothing to
    decode.
    """

    total: float = 0.0
    tools: float = 0.0
    reward: float = 0.0


@dataclass
class _Flight:
    """Turns under way, episodes that still sample (the others are being judged), and those that
    ended since it was looked at.
    """

    turns: dict[Hashable, asyncio.Future[TurnDone]] = field(default_factory=dict)
    work: asyncio.Event = field(default_factory=asyncio.Event)
    sampling: int = 0
    ended: list[asyncio.Task[Any]] = field(default_factory=list)

    def end(self, task: asyncio.Task[Any]) -> None:
        self.ended.append(task)
        self.work.set()


async def roll_out(
    parts: RolloutParts,
    requests: Sequence[tuple[Prompt, int]],
    sampling: Sampling,
    step: int,
    times: RolloutTimes | None = None,
) -> list[Scored] | None:
    """A scored trajectory for each (prompt, sample), in order. None when `parts.stopped` said so in
    between: then nothing is left running and the engine is empty.
    """
    begin = time.perf_counter()
    flight = _Flight()
    times = times or RolloutTimes()
    tasks = [
        asyncio.create_task(_episode(parts, flight, prompt, sample, sampling, step))
        for prompt, sample in requests
    ]
    flight.sampling = len(tasks)
    for task in tasks:
        task.add_done_callback(flight.end)
    try:
        await _drive(parts, flight, len(tasks), times)
        if not all(task.done() for task in tasks):
            return None
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        times.total += time.perf_counter() - begin


async def _drive(parts: RolloutParts, flight: _Flight, episodes: int, times: RolloutTimes) -> None:
    """Engine steps until every episode is done; an episode's own error ends it all."""
    while episodes and not parts.stopped():
        for _ in range(ROUNDS):
            await asyncio.sleep(0)  # whatever became ready goes on: new turns, tool results
        if not parts.engine.idle():
            for turn in parts.engine.step():
                if (future := flight.turns.pop(turn.key, None)) is not None and not future.done():
                    future.set_result(turn)
        elif not flight.ended:
            await _wait(flight, times)
        for task in flight.ended:
            task.result()
        episodes -= len(flight.ended)
        flight.ended.clear()


async def _wait(flight: _Flight, times: RolloutTimes) -> None:
    """Nothing to decode: wait for a new turn or for an episode's end, but not for ever (a signal to
    stop may come).
    """
    flight.work.clear()
    begin = time.perf_counter()
    for_tools = flight.sampling > 0
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(flight.work.wait(), 0.5)
    seconds = time.perf_counter() - begin
    if for_tools:
        times.tools += seconds
    else:
        times.reward += seconds


async def _episode(
    parts: RolloutParts, flight: _Flight, prompt: Prompt, sample: int, sampling: Sampling, step: int
) -> Scored:
    """Sample one trajectory and have it judged."""
    key = (prompt.index, sample)
    started = False
    seed = (sampling.seed, sampling.split, step, prompt.index, sample)
    stop_ids = (*parts.renderer.end_of_turn_ids, *parts.agent.eos_ids)

    async def generate(ids: Sequence[int], max_tokens: int) -> Sampled:
        nonlocal started
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_ids=stop_ids,
            seed=seed,
        )
        future: asyncio.Future[TurnDone] = asyncio.get_running_loop().create_future()
        flight.turns[key] = future
        if started:
            parts.engine.extend(key, ids, params)
        else:
            parts.engine.start(key, ids, params, group=prompt.index)
        started = True
        flight.work.set()
        turn = await future
        reason = "aborted" if turn.reason == "capacity" else turn.reason
        return Sampled(turn.tokens, turn.logp, turn.logp_behaviour, reason)

    try:
        agent = Agent(parts.tools, parts.renderer, parts.agent)
        trajectory = await run_episode(prompt, sample, generate, agent, step)
    finally:
        flight.turns.pop(key, None)
        flight.sampling -= 1
        if started:
            parts.engine.drop(key)
    if trajectory.stop not in LOST:
        return await _judged(parts, trajectory)
    return Scored(
        trajectory,
        0.0,
        0.0,
        {TOOL_FAILURE: trajectory.tool_failure} if trajectory.tool_failure else {},
    )


async def _judged(parts: RolloutParts, trajectory: Trajectory) -> Scored:
    """The trajectory with its score; lost, where it is the judges that are."""
    judged = await parts.judge.judge(trajectory)
    if judged.failure == JUDGES_LOST:
        return Scored(
            replace(trajectory, stop=Stop.INFRASTRUCTURE), 0.0, 0.0, {TOOL_FAILURE: judged.reason}
        )
    reward = judged.score
    if parts.overlong is not None:
        longest = parts.agent.max_response_length
        reward += overlong_penalty(
            trajectory.response_length, longest, parts.overlong.buffer, parts.overlong.factor
        )
    return Scored(trajectory, judged.score, reward, judged.info, judged.failure, judged.trace)
