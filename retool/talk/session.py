"""One conversation: what was said, and an answer that streams while it is sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from retool.engine import SamplingParams as TurnParams
from retool.engine import TurnDone
from retool.llm.answer import Detokenizer
from retool.rl.agent.calls import clean
from retool.rl.agent.episode import Episode, Sampled
from retool.rl.agent.loop import calls_in, play_turns, turn_text
from retool.rl.agent.reading.call import Call
from retool.rl.agent.states import close_each
from retool.rl.agent.tools.state import State
from retool.rl.types import Prompt, Stop
from retool.talk.agent import Talker, to_message, without_thoughts

PIECE_TOKENS = 4  # are sampled between two looks at the screen
KEY = "chat"


class Screen(Protocol):
    """Where an answer is shown while it comes."""

    def write(self, text: str, /) -> None:
        """All of a turn so far."""
        ...

    def end_turn(self, calls: Sequence[Call], /) -> None:
        """The turn is whole, and makes these calls."""
        ...

    def result(self, name: str, text: str, /) -> None:
        """What a tool answered."""
        ...


@dataclass
class Voice:
    """The model's side of one answer: samples its turns, and shows them piece by piece."""

    talker: Talker
    screen: Screen
    episode: Episode
    params: TurnParams
    shown: int  # messages of the episode
    started: bool = False
    unfinished: list[int] = field(default_factory=list)  # tokens of the turn that is being sampled

    async def speak(self, ids: Sequence[int], max_tokens: int) -> Sampled:
        """A turn after `ids`, see `retool.rl.agent.loop.Generate`."""
        self.show_results()
        sampled = Sampled([], [], [], "length")
        detokenizer = Detokenizer(self.talker.llm.tokenizer, skip_special_tokens=False)
        while sampled.reason == "length" and len(sampled.tokens) < max_tokens:
            piece = min(PIECE_TOKENS, max_tokens - len(sampled.tokens))
            turn = await self._piece([] if sampled.tokens else ids, piece)
            sampled = _longer(sampled, turn)
            self.unfinished = list(sampled.tokens)
            detokenizer.add(self._said(turn.tokens))
            self.screen.write(detokenizer.text)
        agent = self.talker.agent
        text = turn_text(agent.renderer, self._said(sampled.tokens))
        self.screen.write(text)
        self.screen.end_turn(calls_in(text, agent))
        self.unfinished = []
        self.shown = len(self.episode.messages) + 1  # with the turn that the loop adds now
        return sampled

    async def _piece(self, ids: Sequence[int], max_tokens: int) -> TurnDone:
        engine = self.talker.llm.engine
        params = replace(self.params, max_tokens=max_tokens)
        if self.started:
            engine.extend(KEY, ids, params)
        else:
            engine.start(KEY, ids, params)
            self.started = True
        while True:
            await asyncio.sleep(0)  # where Ctrl-C reaches it
            for turn in engine.step():
                return turn

    def _said(self, ids: Sequence[int]) -> Sequence[int]:
        """Without the token that ended the turn."""
        return ids[:-1] if ids and ids[-1] in self.params.stop_ids else ids

    def show_results(self) -> None:
        """What the tools answered since the last turn, and what an environment said."""
        for message in self.episode.messages[self.shown :]:
            role = message["role"]
            if role != "assistant":
                name = message.get("name", "") if role == "tool" else role
                self.screen.result(name, message["content"])
        self.shown = len(self.episode.messages)

    def end(self) -> None:
        if self.started:
            self.talker.llm.engine.drop(KEY)


def _longer(sampled: Sampled, turn: TurnDone) -> Sampled:
    return Sampled(
        [*sampled.tokens, *turn.tokens],
        [*sampled.logp, *turn.logp],
        [*sampled.logp_behaviour, *turn.logp_behaviour],
        "aborted" if turn.reason == "capacity" else turn.reason,
    )


@dataclass
class Session:
    """A conversation. `messages` are without the `system` message, which stands before them.

    What tools keep in `states` lives as long as the conversation: end it with `close`.
    """

    talker: Talker
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    answers: int = 0

    async def reset(self) -> None:
        """Forget what was said, and have tools close what they kept; the system message stays."""
        self.messages.clear()
        await self.close()

    async def close(self) -> None:
        """Have tools close what they kept."""
        kept = list(self.states.values())
        self.states.clear()
        await close_each(kept)

    async def answer(self, text: str, screen: Screen) -> tuple[Stop, str]:
        """Say `text`, and show what the model answers: why that ended, and what a tool that broke
        said. Cancelled, it keeps what the model had said.

        ValueError where the conversation has no room, or can't be rendered; it is as before then.
        """
        said = [*self.messages, {"role": "user", "content": clean(text)}]
        prompt = self._prompt(said)
        episode = Episode.begin(prompt)
        episode.states = self.states
        known = len(episode.messages)
        # Counted, so that the same question asked again gets another answer.
        self.answers += 1
        params = turn_params(self.talker, self.answers)
        voice = Voice(self.talker, screen, episode, params, shown=known)
        before = self.messages
        self.messages = said
        try:
            stop, failure = await play_turns(episode, voice.speak, self.talker.within(prompt))
        except asyncio.CancelledError:
            # Ctrl-C stops an answer, not the conversation: what was said so far stays in it.
            if voice.unfinished:
                rest = turn_text(self.talker.agent.renderer, voice.unfinished)
                episode.messages.append({"role": "assistant", "content": rest})
                screen.end_turn(())
            stop = Stop.ABORTED
            failure = ""
        except ValueError:  # a reader of calls of the user's own, for one
            self.messages = before
            raise
        finally:
            voice.end()
        voice.show_results()
        self._keep(episode.messages[known:])
        return stop, failure

    def _keep(self, messages: Sequence[dict[str, Any]]) -> None:
        """Remember an answer as the template shows earlier ones."""
        for message in messages:
            if message["role"] == "assistant":
                message = without_thoughts(to_message(message["content"], self.talker))
            self.messages.append(message)

    def _prompt(self, said: list[dict[str, Any]]) -> Prompt:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *said]
        llm = self.talker.llm
        ids = llm.renderer.render_prompt(messages, self.talker.schemas)
        if len(ids) >= llm.max_model_len:
            raise ValueError(
                f"the conversation has {len(ids):,} tokens, and the model takes "
                f"{llm.max_model_len:,} with its answer. /reset begins a new one."
            )
        return Prompt(0, messages, self.talker.schemas, np.asarray(ids, np.int32), "", "")


def turn_params(talker: Talker, number: int) -> TurnParams:
    """How tokens of the answer of that number are drawn: in each otherwise, and the same in each run
    of the program.
    """
    sampling = talker.sampling
    return TurnParams(
        # `speak` says how many, piece by piece
        max_tokens=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_ids=talker.agent.stop_ids,
        seed=(sampling.seed or 0, number),
    )
