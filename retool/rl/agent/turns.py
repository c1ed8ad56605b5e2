"""Turns that one engine samples for many episodes at once: each episode waits for its own."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from retool.engine import Sampler, SamplingParams, TurnDone
from retool.rl.agent.episode import Episode, Sampled
from retool.rl.agent.loop import Generate
from retool.rl.agent.options import Agent

# Between engine steps: in so many a finished turn's call is on its way, and a tool's answer in the
# engine
EVENT_LOOP_ROUNDS = 3


@dataclass
class Turns:
    """Turns under way, by the keys of their sequences. `work` wakes who waits for a new one."""

    engine: Sampler
    waiting: dict[Hashable, asyncio.Future[TurnDone]] = field(default_factory=dict)
    work: asyncio.Event = field(default_factory=asyncio.Event)

    def step(self) -> None:
        """A step of the engine; whoever waits for a turn that ended with it goes on."""
        for turn in self.engine.step():
            future = self.waiting.pop(turn.key, None)
            if future is not None and not future.done():  # its episode may be gone
                future.set_result(turn)


async def let_others_run() -> None:
    """Whatever became ready since the last step goes on: new turns, results of tools."""
    # sleep(0) gives every other coroutine one turn: a future's result takes several to reach who
    # waits.
    for _ in range(EVENT_LOOP_ROUNDS):
        await asyncio.sleep(0)


@dataclass
class EngineSequence:
    """An episode's sequence in the engine; `params` but for each turn's `max_tokens`.

    The samples of one prompt are a `group`. `more` are the trajectory's other contexts.
    """

    turns: Turns
    key: Hashable
    params: SamplingParams
    group: Hashable = None
    started: bool = False
    more: list[EngineSequence] = field(default_factory=list)

    async def generate(self, ids: Sequence[int], max_tokens: int) -> Sampled:
        """Give the engine `ids`, and wait for the turn that it makes."""
        params = replace(self.params, max_tokens=max_tokens)
        future: asyncio.Future[TurnDone] = asyncio.get_running_loop().create_future()
        self.turns.waiting[self.key] = future
        if self.started:
            self.turns.engine.extend(self.key, ids, params)
        else:
            self.turns.engine.start(self.key, ids, params, group=self.group)
        self.started = True
        self.turns.work.set()
        try:
            turn = await future
        except asyncio.CancelledError:  # nobody waits for it any more
            self.end()
            raise
        # A server may end a turn before its first token: then nothing was sampled, whatever it says
        reason = "aborted"
        if turn.reason != "capacity" and turn.tokens:
            reason = turn.reason
        return Sampled(
            turn.tokens,
            turn.logp,
            turn.logp_behaviour,
            reason,
            turn.experts,
        )

    def begin_in_world(self, episode: Episode, agent: Agent) -> Generate:
        """Go on with a prompt that the group's other samples need not have: those that do share it."""
        del agent  # its tools are none of the engine's business
        self.group = (self.group, episode.prompt.ids.tobytes())
        return self.generate

    def begin_another(self, number: int, ids: Sequence[int]) -> Generate:
        """What samples in the trajectory's context of that number, which begins with `ids`.

        Each draws for itself: its number is part of its seed. The first draws as the ordinary loop.
        """
        group = (self.group, np.asarray(ids, np.int32).tobytes())
        another = EngineSequence(self.turns, self.key, self.params, group)
        if number:
            another.key = (self.key, number)
            another.params = replace(self.params, seed=(*self.params.seed, number))
        self.more.append(another)
        return another.generate

    def end(self) -> None:
        if self.started:
            self.started = False
            self.turns.waiting.pop(self.key, None)
            self.turns.engine.drop(self.key)
        for another in self.more:
            another.end()
