"""What the model was given and what it sampled, token by token: a trajectory's contexts.

A context is one sequence of the engine's. Messages that go on where a turn of the model ended
follow it there, whatever the loop keeps them in: sampled ids stay. Messages that go on from an
earlier turn begin a context with the very tokens up to there. Any others begin one that is rendered
anew. What a model sampled is trained where it was sampled; in a context that begins with it, it is
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from retool.batch import NO_EXPERTS
from retool.data.read.rows import to_conversation
from retool.rl.agent.environments.protocol import checked_message
from retool.rl.agent.episode import Episode, Sampled
from retool.rl.agent.loop import Generate
from retool.rl.agent.options import Agent
from retool.rl.reward.foreign import shown
from retool.rl.types import Prompt

Message = dict[str, Any]


class Place(NamedTuple):
    """Where a turn ended: with so many messages and tokens of its context. `ended`: by a token that
    ends turns.
    """

    messages: int
    tokens: int
    ended: bool


@dataclass
class Context:
    """One sequence, prompt and all; log-probabilities are of what was sampled."""

    generate: Generate
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    logp_behaviour: list[float] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)
    messages: list[Message] | None = None  # None: it was given as tokens
    prompt_length: int = 0
    places: list[Place] = field(default_factory=list)  # where its turns ended
    turns: list[int] = field(default_factory=list)  # their numbers
    joins: list[int] = field(default_factory=list)  # where one begins right behind another
    busy: bool = False  # a turn of it is being sampled

    def add(self, given: Given, turn: Sampled, text: str, number: int, ended: bool) -> None:
        """Record what was given, and the turn that was sampled after it, with its text."""
        if not self.turns:
            self.prompt_length = len(given.ids)
        elif not given.ids:
            self.joins.append(len(self.tokens))
        self.tokens += given.ids
        self.tokens += turn.tokens
        self.mask += [False] * len(given.ids)
        self.mask += [True] * len(turn.tokens)
        self.logp += turn.logp
        self.logp_behaviour += turn.logp_behaviour
        if turn.experts is not None:
            self.experts.append(turn.experts)
        self.turns.append(number)
        self.busy = False
        self.messages = None
        if given.messages is not None:
            self.messages = [*given.messages, {"role": "assistant", "content": text}]
            self.places.append(Place(len(self.messages), len(self.tokens), ended))

    def all_experts(self) -> list[np.ndarray]:
        """Of each token who computed it; `NO_EXPERTS` where the engine computed nothing from it."""
        if not self.experts:
            return []
        told = np.concatenate(self.experts)
        missing = len(self.tokens) - len(told)
        return [np.pad(told, ((0, missing), (0, 0), (0, 0)), constant_values=NO_EXPERTS)]


@dataclass
class Given:
    """What a turn is asked for with: in which context, `ids` that are new there, all of its
    `messages` (None: it is tokens), and which of these no turn was given before.
    """

    context: Context
    ids: list[int]
    messages: list[Message] | None
    new: list[Message]

    @property
    def follows(self) -> bool:
        """Whether something was said to a turn, and not to begin with."""
        return bool(self.context.turns and self.ids)


@dataclass
class Contexts:
    """A trajectory's contexts, in the order in which they began.

    `begin` is what samples in the context of that number, which begins with these ids.
    """

    prompt: Prompt
    agent: Agent
    begin: Callable[[int, Sequence[int]], Generate]
    most_tokens: int  # of a context
    all: list[Context] = field(default_factory=list)

    def place(self, asked: Any) -> Given:
        """Where the turn after `asked` (messages or token ids) belongs. ValueError where there can
        be none.
        """
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        elif callable(getattr(asked, "tolist", None)):  # an array of numpy's or torch's
            asked = asked.tolist()
        if not isinstance(asked, Sequence) or not asked:
            raise ValueError(f"generate was given {shown(asked)}: give messages, or token ids.")
        if all(_is_token(entry) for entry in asked):
            return self._after_tokens([int(token) for token in asked])
        return self._after_messages(list(asked))

    def room(self, given: Given) -> int:
        """How many tokens may be sampled after it; 0 or less: none."""
        context = given.context
        length = len(context.tokens) + len(given.ids)
        # Before its first turn, what it is given is its prompt, which takes none of the response's
        # room
        prompt_length = context.prompt_length if context.turns else len(given.ids)
        response_room = self.agent.options.max_response_length - (length - prompt_length)
        return min(response_room, self.most_tokens - length)

    def take(self, given: Given) -> None:
        """The turn is about to be sampled."""
        context = given.context
        if context not in self.all:
            self.all.append(context)
            context.generate = self.begin(len(self.all) - 1, given.ids)
        context.busy = True

    # --- where a turn belongs ---

    def _after_tokens(self, ids: list[int]) -> Given:
        known = len(self.agent.renderer.tokenizer)
        wrong = next((token for token in ids if not 0 <= token < known), None)
        if wrong is not None:
            raise ValueError(f"generate was given the token {wrong}: there are {known}.")
        for context in self.all:
            length = len(context.tokens)
            if not context.busy and context.turns and context.tokens == ids[:length]:
                return Given(context, ids[length:], None, [])
        return Given(self._fresh(), ids, None, [])

    def _after_messages(self, asked: list[Any]) -> Given:
        messages = [dict(message) if hasattr(message, "keys") else message for message in asked]
        if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            raise ValueError("generate was given messages that end with the model's own turn.")
        found = self._turn_before(messages)
        if found is None:
            return self._rendered(messages)
        # The turn is kept token by token, as it was sampled; only what came after it is rendered
        context, place = found
        responses = [checked_message(message) for message in messages[place.messages :]]
        ids = self.agent.renderer.render_tool_turn(
            messages[: place.messages], responses, self.prompt.tools, ended=place.ended
        )
        if place.tokens == len(context.tokens) and not context.busy:
            return Given(context, ids, messages, responses)
        # Somebody went on from this turn already: a context of its own begins with the same tokens
        before = context.tokens[: place.tokens]
        return Given(self._fresh(), [*before, *ids], messages, responses)

    def _turn_before(self, messages: list[Any]) -> tuple[Context, Place] | None:
        """The last turn that these messages go on from, with others than the model's."""
        last = max((i for i, m in enumerate(messages) if _is_of_model(m)), default=-1)
        for context in self.all:
            for place in context.places:
                if place.messages == last + 1 and self._is_at(context, place, messages):
                    return context, place
        return None

    def _is_at(self, context: Context, place: Place, messages: list[Any]) -> bool:
        known = context.messages
        return known is not None and known[: place.messages] == messages[: place.messages]

    def _rendered(self, messages: list[Any]) -> Given:
        """A context that begins with a render of these."""
        prompt = self.prompt
        if messages == prompt.messages:  # they were checked and rendered
            return Given(self._fresh(), prompt.ids.tolist(), messages, [])
        row = {"messages": messages, "tools": prompt.tools or None}
        checked = to_conversation(row, "generate", 0, prompt_only=True)
        ids = self.agent.renderer.render_prompt(checked.messages, checked.tools)
        pairs = zip(messages, prompt.messages, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return Given(self._fresh(), ids, messages, messages[shared:])

    def _fresh(self) -> Context:
        return Context(_never)

    # --- what is trained ---

    def put_into(self, episode: Episode) -> list[int]:
        """Give the episode the tokens of all contexts in which something was sampled; the numbers
        of their turns, as they stand in these.
        """
        trained = [context for context in self.all if context.turns]
        if not trained:
            return []
        first = trained[0]
        begin = first.prompt_length
        ids = np.asarray(first.tokens[:begin], np.int32)
        episode.prompt = replace(self.prompt, ids=ids)
        episode.tokens = _joined([c.tokens for c in trained])[begin:]
        episode.mask = _joined([c.mask for c in trained])[begin:]
        episode.logp = _joined([c.logp for c in trained])
        episode.logp_behaviour = _joined([c.logp_behaviour for c in trained])
        episode.experts = _joined([c.all_experts() for c in trained])
        ends = np.cumsum([len(context.tokens) for context in trained])
        episode.cuts = tuple(int(end) for end in ends[:-1])
        begins = (0, *episode.cuts)
        joins = [[at + j for j in c.joins] for c, at in zip(trained, begins, strict=True)]
        episode.joins = tuple(_joined(joins))
        return _joined([c.turns for c in trained])


def _joined(lists: Sequence[list[Any]]) -> list[Any]:
    return [entry for part in lists for entry in part]


def _is_token(entry: Any) -> bool:
    return isinstance(entry, (int, np.integer)) and not isinstance(entry, bool)


def _is_of_model(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


async def _never(ids: Sequence[int], max_tokens: int, /) -> Sampled:
    raise AssertionError("a context is taken before it is sampled in")
