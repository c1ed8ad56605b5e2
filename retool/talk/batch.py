"""Answers to many questions at once: the engine samples for some while tools run for others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from retool.engine import SamplingParams as TurnParams
from retool.rl.agent.environments.play import Attempt, Worlds, run_in_world, seed_of
from retool.rl.agent.episode import Episode
from retool.rl.agent.loop import Generate, play
from retool.rl.agent.options import Agent
from retool.rl.agent.turns import EngineSequence, Turns, let_others_run
from retool.talk.agent import FINISH_REASONS, Talker, to_message
from retool.talk.questions import Question

AHEAD = 4  # episodes under way for each that the engine samples at once: some wait for tools
SECONDS_TO_WAIT = 0.5  # with nothing to sample


@dataclass(frozen=True)
class Completion:
    """One answer: `messages` are the model's turns and what the tools said between them.

    In an environment they begin with what that says first; `rewards` are those of the model's turns.
    """

    messages: list[dict[str, Any]]
    finish_reason: str
    tokens: int
    tool_failure: str = ""
    rewards: tuple[float, ...] | None = None

    @property
    def reward(self) -> float | None:
        """What an environment gave for all of it; None where it failed, and where there is none."""
        if self.rewards is None or self.tool_failure:
            return None
        return float(sum(self.rewards))

    def as_dict(self) -> dict[str, Any]:
        """As the output file has it."""
        said = [message for message in self.messages if message["role"] == "assistant"]
        last = said[-1]["content"] if said else ""
        found: dict[str, Any] = {"text": last, "finish_reason": self.finish_reason}
        found |= {"tokens": self.tokens, "messages": self.messages}
        if self.rewards is not None:
            found |= {"reward": self.reward, "rewards": list(self.rewards)}
        return {**found, "tool_failure": self.tool_failure} if self.tool_failure else found


async def answer_all(
    talker: Talker, questions: Sequence[Question]
) -> AsyncIterator[tuple[Question, list[Completion]]]:
    """Each question with its answers, in the order of the questions.

    What is drawn for one is a function of the seed, its index and the sample, and of nothing else.
    """
    turns = Turns(talker.llm.engine)
    jobs = _jobs(talker, turns, questions)
    window = AHEAD * talker.llm.engine.options.max_num_seqs
    under_way = [asyncio.create_task(job) for job in islice(jobs, window)]
    n = talker.sampling.n
    try:
        for question in questions:
            mine = under_way[:n]
            while not all(task.done() for task in mine):
                await _go_on(turns)
                done = sum(task.done() for task in under_way)
                room = window + done - len(under_way)
                under_way += [asyncio.create_task(job) for job in islice(jobs, room)]
                mine = under_way[:n]
            yield question, [task.result() for task in mine]
            under_way = under_way[n:]
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _go_on(turns: Turns) -> None:
    """A step of the engine, or the wait for a tool."""
    await let_others_run()
    if not turns.engine.idle():
        turns.step()
        return
    turns.work.clear()
    try:
        await asyncio.wait_for(turns.work.wait(), SECONDS_TO_WAIT)
    except asyncio.TimeoutError:
        return


def _jobs(talker: Talker, turns: Turns, questions: Sequence[Question]) -> Iterator[Any]:
    for question in questions:
        for sample in range(talker.sampling.n):
            yield _complete(talker, turns, question, sample)


async def _complete(talker: Talker, turns: Turns, question: Question, sample: int) -> Completion:
    """One answer to one question."""
    prompt = question.prompt
    sampling = talker.sampling
    params = TurnParams(
        max_tokens=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_ids=talker.agent.stop_ids,
        # By row, not by what is sampled beside it: a run that goes on draws what it would have
        # drawn
        seed=(sampling.seed or 0, prompt.index, sample),
    )
    sequence = EngineSequence(turns, (prompt.index, sample), params, group=prompt.index)
    if talker.worlds is not None:
        return await _play(talker, talker.worlds, sequence, Attempt(prompt, sample))
    episode = Episode.begin(prompt)
    try:
        stop, failure = await play(episode, sequence.generate, talker.within(prompt))
    finally:
        sequence.end()
    messages = _shown(episode.messages[len(prompt.messages) :], talker)
    return Completion(messages, FINISH_REASONS[stop], sum(episode.mask), failure)


async def _play(
    talker: Talker, worlds: Worlds, sequence: EngineSequence, attempt: Attempt
) -> Completion:
    """An episode in an environment."""
    prompt = attempt.prompt
    agents = [talker.in_world(prompt)]

    def begin(episode: Episode, agent: Agent) -> Generate:
        agents.append(agent)  # with the environment's tools
        return sequence.begin_in_world(episode, agent)

    seed = seed_of(talker.sampling.seed or 0, 0, prompt.index)
    attempt = replace(attempt, seed=seed)
    try:
        played = await run_in_world(attempt, begin, agents[0], worlds)
    finally:
        sequence.end()
    there = replace(talker, agent=agents[-1])
    messages = [*played.prompt.messages, *_shown(played.messages, there)]
    tokens = int(played.mask.sum())
    reason = FINISH_REASONS[played.stop]
    return Completion(messages, reason, tokens, played.tool_failure, played.turn_rewards)


def _shown(messages: Sequence[Mapping[str, Any]], talker: Talker) -> list[dict[str, Any]]:
    return [
        to_message(message["content"], talker) if message["role"] == "assistant" else dict(message)
        for message in messages
    ]
