"""The turns of a trajectory in an environment: the model's, then the world's.

What the world says is rendered as tools' answers are, and never trained. Sampled ids stay as they
are: see `loop`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retool.data.read.rows import to_conversation
from retool.rl.agent.calls import run_calls
from retool.rl.agent.environments.load import let_go
from retool.rl.agent.environments.protocol import Answer, EnvironmentFailure, Opening
from retool.rl.agent.environments.world import World
from retool.rl.agent.episode import Episode
from retool.rl.agent.formats.table import FormatFailure
from retool.rl.agent.loop import (
    Generate,
    calls_in,
    sample_turn,
    take_turn,
    tool_turn,
    turns_used_up,
)
from retool.rl.agent.options import Agent
from retool.rl.agent.reading.call import Call, check
from retool.rl.agent.reading.form import before_calls, without_thoughts
from retool.rl.agent.states import close_states
from retool.rl.agent.tools.load import make_tools
from retool.rl.agent.tools.protocol import AnyTool, ToolResult, check_schema, function_of
from retool.rl.reward.foreign import own_copy
from retool.rl.types import Prompt, Stop, Trajectory


@dataclass(frozen=True)
class Worlds:
    """How a run's trajectories get their environments: `make` makes the object of one.

    `seconds` limits each of its calls, `max_prompt_length` (tokens) what it begins with.
    """

    make: Callable[[], Any]
    seconds: float
    max_prompt_length: int

    def let_go(self) -> None:
        """The run is over."""
        let_go(self.make)


@dataclass(frozen=True)
class Attempt:
    """Which trajectory it is. `seed` is the prompt's: the same for all of its samples."""

    prompt: Prompt
    sample: int
    seed: int = 0
    version: int = 0

    def row(self) -> dict[str, Any]:
        """What `reset` is given: the row, in the general schema too, and what tells its
        trajectories apart. It is a copy, for a world to change.
        """
        prompt = self.prompt
        given = {
            **prompt.row,
            "prompt": prompt.messages,
            "data_source": prompt.data_source,
            "ability": prompt.ability,
            "reward_model": {"ground_truth": prompt.ground_truth},
            "extra_info": dict(prompt.extra_info),
            "seed": self.seed,
            "sample": self.sample,
        }
        return own_copy(given)


def seed_of(seed: int, split: int, index: int) -> int:
    """The seed of a prompt's worlds: the run's, the split's and its place in the stream decide."""
    text = f"{seed}/{split}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


async def run_in_world(
    attempt: Attempt, begin: Callable[[Episode, Agent], Generate], agent: Agent, worlds: Worlds
) -> Trajectory:
    """One trajectory in a world of its own. `begin` is told of the episode, whose prompt the world
    made, and of the agent with the world's tools.

    The world may fail in any way: the trajectory is lost then. Only `begin` and `generate` raise.
    """
    world = World(worlds.make, worlds.seconds)
    episode = Episode.begin(attempt.prompt, attempt.sample)
    stop = Stop.INFRASTRUCTURE
    failure = ""
    try:
        opening = await world.reset(attempt.row())
        play = prepare(attempt.prompt, opening, agent, worlds.max_prompt_length)
        # Anew: the world may have written a prompt of its own.
        episode = Episode.begin(play.prompt, attempt.sample)
        stop = await play.turns(episode, begin(episode, play.agent), world)
    except (EnvironmentFailure, FormatFailure) as error:
        failure = str(error)
    # Both are closed, whatever either raises.
    finally:
        try:
            unclosed = await world.close()
        finally:
            await close_states(episode)
    failure = failure or unclosed
    if failure:
        stop = Stop.INFRASTRUCTURE
    return episode.finish(stop, attempt.version, failure)


class OfWorld:
    """A tool that the environment declares, and answers the calls of in its `step`."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema = dict(schema)
        self.name = str(function_of(self.schema)["name"])
        check_schema(self.name, self.schema)

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        raise AssertionError(f"a call of {self.name} is the environment's")

    async def close(self) -> None:
        """There is nothing to end."""


@dataclass(frozen=True)
class Play:
    """A trajectory's own prompt and tools; `own` are the names of those that its world answers."""

    prompt: Prompt
    agent: Agent
    own: frozenset[str]

    async def turns(self, episode: Episode, generate: Generate, world: World) -> Stop:
        """All turns, and what the world gives where it isn't done: why the trajectory ended."""
        stop, unheard = await self._turns(episode, generate, world)
        # An aborted trajectory is lost anyway. Any other one that ends before its world does is
        # heard out once more.
        if stop is not Stop.ABORTED and not world.done:
            message = self._message(unheard, ()) if unheard is not None else None
            reward = await world.cut(message)
            if reward:
                episode.reward_turn(reward)
        return stop

    async def _turns(
        self, episode: Episode, generate: Generate, world: World
    ) -> tuple[Stop, str | None]:
        """(why the trajectory ended, its last turn's text where the world hasn't heard of it)."""
        agent = self.agent
        limit = agent.options.max_response_length
        new_ids: Sequence[int] = self.prompt.ids.tolist()
        while True:
            turn = await sample_turn(generate, new_ids, limit - len(episode.tokens), agent)
            stop, calls = take_turn(episode, turn, agent)
            # All of its message: tools may have answered in the middle of it
            said = str(episode.messages[-1]["content"])
            if stop is Stop.ABORTED or stop is Stop.LENGTH:
                return stop, said
            if stop is not None and not agent.options.inline_ids:
                # The world hears of a last turn too, and rewards it
                calls = calls_in(said, agent)
            others, asked = self._divide(calls)
            answer = None
            unheard: str | None = said
            if asked or not others:
                earlier = said.removesuffix(episode.texts[-1])
                answer = await world.step(self._message(said, asked, earlier))
                episode.reward_turn(answer.reward)
                unheard = None
                if answer.done:
                    episode.messages += answer.messages
                    return Stop.DONE, None
            if stop is Stop.EOS:
                return stop, unheard
            if turns_used_up(episode, agent):
                return Stop.MAX_TURNS, unheard
            responses, done = await self._responses(episode, others, answer)
            if done:
                episode.messages += responses
                return Stop.DONE, unheard
            new_ids = await self._render(episode, responses)
            if len(episode.tokens) + len(new_ids) >= limit:  # no room for an answer to it
                return Stop.LENGTH, unheard
            episode.add_tool_turn(responses, new_ids)

    def _divide(self, calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
        """(calls that the loop answers: of the run's tools, and wrong ones; the world's)."""
        asked = [call for call in calls if call.name in self.own and self._is_right(call)]
        return [call for call in calls if call not in asked], asked

    def _is_right(self, call: Call) -> bool:
        return check(call, self.agent.schemas) is None

    def _message(self, text: str, calls: Sequence[Call], earlier: str = "") -> dict[str, Any]:
        """A turn of the model as the world is told of it: without its thoughts. What it said
        `earlier` stands before calls that were answered in the middle of it.
        """
        agent = self.agent
        reasoning = agent.renderer.reasoning
        said = text
        if calls:
            last = text[len(earlier) :]
            said = earlier + before_calls(agent.options.format, last, reasoning)
        if reasoning != "none":
            said = without_thoughts(said).lstrip()
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if calls:
            message["tool_calls"] = [_as_called(call) for call in calls]
        return message

    async def _responses(
        self, episode: Episode, others: Sequence[Call], answer: Answer | None
    ) -> tuple[list[dict[str, Any]], bool]:
        """What stands between this turn and the next: what tools answered, then what the world did;
        and whether a tool said that it is over.
        """
        by_world = answer.messages if answer is not None else ()
        if not others:
            return [*by_world], False
        found = await run_calls(episode, others, self.agent)
        if found.failure is not None:
            raise EnvironmentFailure(found.failure)
        return [*found.messages, *by_world], found.done

    async def _render(self, episode: Episode, responses: list[dict[str, Any]]) -> list[int]:
        try:
            return await tool_turn(episode, responses, self.agent)
        except ValueError as error:
            raise EnvironmentFailure(f"environment.step: its messages: {error}") from error


def _as_called(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def prepare(prompt: Prompt, opening: Opening, agent: Agent, max_prompt_length: int) -> Play:
    """The trajectory's prompt as its world made it, with the tools of the run and of the world.

    EnvironmentFailure for messages or tools that can't be used, and for a prompt of more than
    `max_prompt_length` tokens.
    """
    try:
        added: list[AnyTool] = []
        for tool in opening.tools:
            added += [OfWorld(tool)] if isinstance(tool, Mapping) else make_tools([tool])
        tools = {**agent.tools, **{tool.name: tool for tool in added}}
        if len(tools) < len(agent.tools) + len(added):
            raise ValueError(f"two tools have one name: {', '.join(tools)}")
        declared = [*(prompt.tools or ()), *(tool.schema for tool in added)]
        own = frozenset(tool.name for tool in added if isinstance(tool, OfWorld))
        if not added and opening.messages == prompt.messages:  # they were checked and rendered
            return Play(prompt, replace(agent, tools=tools), own)
        row = {"messages": opening.messages, "tools": declared or None}
        checked = to_conversation(row, "reset", 0, prompt_only=True)
        if checked.messages[-1]["role"] == "assistant":
            raise ValueError("its messages end with the model's own turn")
        ids = agent.renderer.render_prompt(checked.messages, checked.tools)
        if len(ids) > max_prompt_length:
            raise ValueError(
                f"its messages have {len(ids)} tokens, more than "
                f"data.max_prompt_length={max_prompt_length}"
            )
    except ValueError as error:
        raise EnvironmentFailure(f"environment.reset: {error}") from error
    made = replace(
        prompt, messages=checked.messages, tools=checked.tools, ids=np.asarray(ids, np.int32)
    )
    return Play(made, replace(agent, tools=tools), own)
