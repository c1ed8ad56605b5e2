"""Records a trajectory that a user's loop plays: what it asked for, what it got, and what is
trained.

All of this runs on the run's own event loop. The user's function reaches it by way of `handles`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from retool.rl.agent.calls import Answers, run_calls
from retool.rl.agent.environments.play import Attempt
from retool.rl.agent.environments.protocol import read_reward
from retool.rl.agent.episode import Episode, Sampled
from retool.rl.agent.formats.table import FormatFailure
from retool.rl.agent.loop import Generate, sample_turn, take_turn, turns_used_up
from retool.rl.agent.loops.contexts import Contexts, Given
from retool.rl.agent.loops.protocol import (
    FORM_OF_ENDING,
    Ending,
    LoopFailure,
    ToolAnswer,
    TrajectoryOver,
    Turn,
)
from retool.rl.agent.options import Agent
from retool.rl.agent.reading.call import Call
from retool.rl.agent.truncation import cut_text
from retool.rl.reward.foreign import plain, shown
from retool.rl.types import Stop, Trajectory


class Recorder:
    """Has the engine make turns and the tools answer them, and keeps what came of it.

    `failure` is what went wrong that isn't the policy's doing, "" where nothing did; it stays so,
    whatever the user's function makes of it. `error` is one of the run's own.
    """

    def __init__(
        self,
        attempt: Attempt,
        agent: Agent,
        begin: Callable[[int, Sequence[int]], Generate],
        most_tokens: int,
    ) -> None:
        self.attempt = attempt
        self.agent = agent
        self.contexts = Contexts(attempt.prompt, agent, begin, most_tokens)
        self.episode = Episode.begin(attempt.prompt, attempt.sample)
        self.turns: list[Turn] = []
        self.failure = ""
        self.is_aborted = False
        self.error: Exception | None = None
        self._asked = 0  # turns
        self._under_way = 0  # of them
        self._story: dict[int, list[dict[str, Any]]] = {}  # what was said, by turn

    # --- what the user's function asks for ---

    async def sample(self, asked: Any, max_tokens: int | None = None) -> Turn:
        """The model's turn after `asked`: messages or token ids."""
        most = plain(max_tokens)
        if most is not None and (type(most) is not int or most < 1):
            raise ValueError(
                f"generate was given max_tokens={shown(max_tokens)}: give a whole number, 1 or more."
            )
        if self._asked and turns_used_up(self.episode, self.agent, self._under_way):
            raise TrajectoryOver(Stop.MAX_TURNS)
        # Nothing is awaited between `place` and `take`: of two coroutines that ask at once, each
        # finds its own context.
        given = self.contexts.place(asked)
        room = self.contexts.room(given)
        if room < 1:
            raise TrajectoryOver(Stop.LENGTH)
        self.contexts.take(given)
        number = self._asked
        self._asked += 1
        self._under_way += 1
        try:
            turn = await self._sampled(given, min(room, most or room))
        finally:
            self._under_way -= 1
        return self._recorded(given, turn, number)

    async def answers(self, turn: Turn) -> list[dict[str, Any]]:
        """What tools answer to a turn's calls, as messages; TrajectoryOver where one says so."""
        if not isinstance(turn, Turn):
            raise ValueError(f"tools.answers was given {shown(turn)}: give it what generate gave.")
        place = self._place(turn)
        if place is None:
            raise ValueError("tools.answers was given a turn of another trajectory.")
        answered = await self._answered(turn.calls, place)
        if answered.done:
            self._story[turn.number] += answered.messages
            raise TrajectoryOver(Stop.DONE)
        return answered.messages

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolAnswer:
        """What a tool answers."""
        if not self.turns:
            raise ValueError(
                "tools can be called once the model has said something: generate a turn first."
            )
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise ValueError(
                f"tools.call was given {shown(name)} and {shown(arguments)}: give a tool's name, and "
                "its arguments as a dict."
            )
        answered = await self._answered([Call(name, dict(arguments))], len(self.turns) - 1)
        result = answered.results[0]
        text = str(answered.messages[0]["content"])
        return ToolAnswer(text, result.status, result.reward, result.done)

    # --- what comes of it ---

    def end(self, returned: Any) -> Stop:
        """Why the trajectory ends, with what the function returned. LoopFailure where that is none
        of its turns.
        """
        ending = returned if isinstance(returned, Ending) else Ending(returned)
        turn = ending.turn
        if not isinstance(turn, Turn):
            raise LoopFailure(f"it returned {shown(returned)}, not {FORM_OF_ENDING}")
        place = self._place(turn)
        if place is None:
            raise LoopFailure("it returned a turn of another trajectory")
        if ending.reward is not None:
            self._reward(place, ending.reward)
        return turn.ends or Stop.DONE

    def finish(self, stop: Stop) -> Trajectory:
        """The trajectory, with everything that is trained of it."""
        if self.is_aborted:
            stop = Stop.ABORTED
        elif self.failure:
            stop = Stop.INFRASTRUCTURE
        self._in_order_of_contexts()
        return self.episode.finish(stop, self.attempt.version, self.failure)

    # --- turns ---

    async def _sampled(self, given: Given, room: int) -> Sampled:
        try:
            turn = await sample_turn(given.context.generate, given.ids, room, self.agent)
        # The function's own time limit, which isn't the engine's fault.
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the engine's, which ends the run
            self.error = error
            raise
        if turn.reason == "aborted":
            self.is_aborted = True
            raise TrajectoryOver(Stop.ABORTED)
        return turn

    def _recorded(self, given: Given, sampled: Sampled, number: int) -> Turn:
        episode = self.episode
        episode.user_turns += given.follows
        try:
            stop, calls = take_turn(episode, sampled, self.agent)
        except FormatFailure as error:
            self.failure = str(error)
            raise
        episode.inline = None  # what answers it is the loop's to say
        text = episode.texts[-1]
        self._story[number] = [*given.new, episode.messages[-1]]
        ended = sampled.tokens[-1] in self.agent.turn_ends
        context = given.context
        context.add(given, sampled, text, len(self.turns), ended)
        turn = Turn(
            text,
            tuple(sampled.tokens),
            tuple(sampled.logp),
            "stop" if sampled.reason == "stop" else "length",
            tuple(calls),
            self.contexts.room(replace(given, ids=[])),
            number,
            stop,
            context.tokens,
            len(context.tokens),
        )
        self.turns.append(turn)
        return turn

    # --- tools ---

    async def _answered(self, calls: Sequence[Call], place: int) -> Answers:
        """To calls of the turn of this place: others may end before the tools answer."""
        answers = await run_calls(self.episode, calls, self.agent, place)
        if answers.failure is not None:
            self.failure = answers.failure
            raise LoopFailure(answers.failure)
        for message in answers.messages:
            message["content"] = self._cut(message["content"])
        return answers

    def _cut(self, text: str) -> str:
        """A tool's text as the model is shown it."""
        options = self.agent.options
        limit = options.max_tool_response_length
        if len(text.encode()) < limit:  # a token is a byte at least
            return text
        return cut_text(self.agent.renderer.encoder, text, limit, options.truncate_side)

    def _place(self, turn: Turn) -> int | None:
        """Which of the turns it is, as they ended; None where it is none of them."""
        return next((i for i, own in enumerate(self.turns) if own is turn), None)

    def _reward(self, place: int, given: Any) -> None:
        try:
            reward = read_reward(given)
        except ValueError as error:
            raise LoopFailure(str(error)) from error
        self.episode.reward_turn(reward, place)

    def _in_order_of_contexts(self) -> None:
        """Turns were recorded as they ended. What they say is put in the order in which they were
        asked for; tokens stand context by context, and so do rewards of turns and uses of tools.
        """
        episode = self.episode
        asked = sorted(self.turns, key=lambda turn: turn.number)
        episode.texts = [turn.text for turn in asked]
        told = [message for number in sorted(self._story) for message in self._story[number]]
        episode.messages = [*episode.messages[: len(self.attempt.prompt.messages)], *told]
        order = self.contexts.put_into(episode)
        if episode.turn_rewards:
            missing = len(self.turns) - len(episode.turn_rewards)
            rewards = [*episode.turn_rewards, *[0.0] * missing]
            episode.turn_rewards = [rewards[number] for number in order]
        places = {number: place for place, number in enumerate(order)}
        episode.tool_uses = [use._replace(turn=places[use.turn]) for use in episode.tool_uses]
