"""Sampling trajectories: every episode is a coroutine, the engine decodes whatever is ready while
tools and judges run.

One event loop serves the whole run, so that tools may keep connections. It alternates between one
engine step and whatever became ready meanwhile; a straggler's tool never holds the engine up while
others have tokens to make.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from retool.data.render.renderer import Renderer
from retool.engine import Sampler, SamplingParams
from retool.rl.agent.environments.play import Attempt, Worlds, run_in_world, seed_of
from retool.rl.agent.loop import run_episode
from retool.rl.agent.loops.play import OwnLoop, run_own_loop
from retool.rl.agent.options import Agent, AgentOptions
from retool.rl.agent.tools.of_row import tools_offered
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.agent.turns import EngineSequence, Turns, let_others_run
from retool.rl.agent.work_thread import WorkThread
from retool.rl.reward.builtin import overlong_penalty
from retool.rl.reward.calling import Asked
from retool.rl.reward.protocol import JUDGES_LOST, Judged
from retool.rl.types import COUNTED, LOST, TOOL_FAILURE, Prompt, Scored, Stop, Trajectory

MAX_SECONDS_TO_WAIT = 0.5  # with nothing to decode: a signal to stop may come


class Judge(Protocol):
    """Scores finished trajectories: what a rollout asks of `Judges`."""

    @property
    def seen(self) -> tuple[str, ...]: ...

    async def score(self, asked: Asked, /) -> Judged: ...


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

    engine: Sampler
    judge: Judge
    tools: Mapping[str, AnyTool]
    renderer: Renderer
    agent: AgentOptions
    overlong: Overlong | None = None
    worlds: Worlds | None = None
    own_loop: OwnLoop | None = None
    stopped: Callable[[], bool] = lambda: False  # asked between engine steps
    texts: WorkThread | None = field(default_factory=WorkThread)  # see `Agent`

    def __post_init__(self) -> None:
        """ValueError for a judge of the user's own that can't be asked for a score."""
        judge = self.judge
        missing = [name for name in ("score", "seen") if judge and not hasattr(judge, name)]
        if missing:
            raise ValueError(
                f"the judge {type(self.judge).__name__} has no {' and no '.join(missing)}: give it an async "
                "method score(asked) that returns Judged(number), and a tuple `seen` of what it reads besides "
                "(() for nothing). examples/rl_from_scratch.py has one."
            )

    def let_go(self) -> None:
        """The run is over: so are threads, and what environments share."""
        if self.worlds is not None:
            self.worlds.let_go()
        if self.texts is not None:
            self.texts.end()
        if self.own_loop is not None:
            self.own_loop.threads.end()


@dataclass
class RolloutTimes:
    """Seconds of a rollout: in all, and parts of those.

    `tools`: of each second, the share of the answers under way that waited for tools: all of it
    where there was nothing to decode. `reward`: waiting for judges, with nothing to decode. `loop`:
    between the engine's steps, when the episodes go on.
    """

    total: float = 0.0
    tools: float = 0.0
    reward: float = 0.0
    loop: float = 0.0


@dataclass
class _Underway:
    """`turns` that the engine makes, how many episodes are still `sampling` (the others are being
    judged), and those that `ended` since it was looked at: `turns.work` wakes who waits for one.
    """

    turns: Turns
    sampling: int = 0
    ended: list[asyncio.Task[Any]] = field(default_factory=list)

    @property
    def in_tools(self) -> float:
        """Of the episodes that are still sampling, the share that the engine doesn't have."""
        if not self.sampling:
            return 0.0
        # A loop of the user's may have several turns under way
        return max(0.0, 1 - len(self.turns.waiting) / self.sampling)

    def end(self, task: asyncio.Task[Any]) -> None:
        self.ended.append(task)
        self.turns.work.set()


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
    begin = _now()
    underway = _Underway(Turns(parts.engine))
    times = times or RolloutTimes()
    # All episodes at once, however many: the engine has the queue, and admits what fits its cache.
    tasks = [
        asyncio.create_task(_episode(parts, underway, prompt, sample, sampling, step))
        for prompt, sample in requests
    ]
    underway.sampling = len(tasks)
    for task in tasks:
        task.add_done_callback(underway.end)
    try:
        await _drive(parts, underway, len(tasks), times)
        if not all(task.done() for task in tasks):
            return None
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        # Cancelled isn't ended: tools still close what they keep, and the engine is left only when
        # they have.
        await asyncio.gather(*tasks, return_exceptions=True)
        times.total += _now() - begin


def _now() -> float:
    """Seconds on the event loop's clock."""
    return asyncio.get_running_loop().time()


async def _drive(
    parts: RolloutParts, underway: _Underway, episodes: int, times: RolloutTimes
) -> None:
    """Engine steps until every episode is done; an episode's own error ends it all."""
    while episodes and not parts.stopped():
        begin = _now()
        await let_others_run()
        times.loop += _now() - begin
        if not parts.engine.idle():
            _step(underway, times)
        elif not underway.ended:
            await _wait(underway, times)
        # `result` raises what an episode raised: the engine's errors end the run here.
        for task in underway.ended:
            task.result()
        episodes -= len(underway.ended)
        underway.ended.clear()


def _step(underway: _Underway, times: RolloutTimes) -> None:
    """A step of the engine, which takes nearly as long for few rows: what tools hold is missing."""
    in_tools = underway.in_tools
    begin = _now()
    underway.turns.step()
    times.tools += in_tools * (_now() - begin)


async def _wait(underway: _Underway, times: RolloutTimes) -> None:
    """Nothing to decode: wait for a new turn or for an episode's end."""
    work = underway.turns.work
    work.clear()
    begin = _now()
    # Nothing to decode while an episode still samples: its tool is what everybody waits for.
    for_tools = underway.sampling > 0
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(work.wait(), MAX_SECONDS_TO_WAIT)
    seconds = _now() - begin
    if for_tools:
        times.tools += seconds
    else:
        times.reward += seconds


async def _episode(
    parts: RolloutParts,
    underway: _Underway,
    prompt: Prompt,
    sample: int,
    sampling: Sampling,
    step: int,
) -> Scored:
    """Sample one trajectory and have it judged."""
    tools = tools_offered(parts.tools, prompt.extra_info)
    agent = Agent(tools, parts.renderer, parts.agent, parts.texts)
    params = SamplingParams(
        max_tokens=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_ids=agent.stop_ids,
        seed=(sampling.seed, sampling.split, step, prompt.index, sample),
    )
    key = (prompt.index, sample)
    sequence = EngineSequence(underway.turns, key, params, group=prompt.index)
    seed = seed_of(sampling.seed, sampling.split, prompt.index)
    attempt = Attempt(prompt, sample, seed, step)
    try:
        trajectory = await _played(parts, sequence, attempt, agent)
    finally:
        underway.sampling -= 1
        sequence.end()
    if trajectory.stop not in LOST:
        return await _judged(parts, trajectory)
    failure = trajectory.tool_failure
    info = {TOOL_FAILURE: failure} if failure else {}
    return Scored(trajectory.without_texts(), 0.0, 0.0, info)


async def _played(
    parts: RolloutParts, sequence: EngineSequence, attempt: Attempt, agent: Agent
) -> Trajectory:
    """A trajectory: of a loop of the user's, in an environment, or of neither."""
    if parts.own_loop is not None:
        return await run_own_loop(attempt, sequence.begin_another, agent, parts.own_loop)
    if parts.worlds is not None:
        return await run_in_world(attempt, sequence.begin_in_world, agent, parts.worlds)
    generate = sequence.generate
    return await run_episode(attempt.prompt, attempt.sample, generate, agent, attempt.version)


async def _judged(parts: RolloutParts, trajectory: Trajectory) -> Scored:
    """The trajectory with its score; lost, where it is the judges that are."""
    judged = await parts.judge.score(Asked.about(trajectory, parts.judge.seen))
    trajectory = trajectory.without_texts()
    if judged.failure == JUDGES_LOST:
        lost = replace(trajectory, stop=Stop.INFRASTRUCTURE)
        took = {key: value for key, value in judged.info.items() if key.startswith(COUNTED)}
        return Scored(lost, 0.0, 0.0, {**took, TOOL_FAILURE: judged.reason})
    reward = judged.score
    shaping = parts.overlong
    if shaping is not None:
        reward += overlong_penalty(
            max(trajectory.response_lengths),
            parts.agent.max_response_length,
            shaping.buffer,
            shaping.factor,
        )
    return Scored(trajectory, judged.score, reward, judged.info, judged.failure, judged.trace)
