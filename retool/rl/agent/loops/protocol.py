"""What a loop of the user's is given, what it gives back, and how it may end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from retool.rl.agent.reading.call import Call
from retool.rl.types import Stop

SIGNATURE = "async def {name}(row, generate, tools)"
FORM_OF_ENDING = "the turn that is its answer (what `generate` gave), or Ending(turn, reward=…)"


class LoopFailure(Exception):
    """A loop broke: that says nothing about the policy."""


class TrajectoryOver(Exception):
    """The trajectory ends where the run's own loop would end it: `stop` says why.

    `Stop.LENGTH`: its context has no room for another token. `Stop.MAX_TURNS`: its turns are used
    up. `Stop.DONE`: a tool said so. A loop that lets it pass ends like that; one that has another
    way to go on, with a shorter context, say, may catch it.
    """

    def __init__(self, stop: Stop) -> None:
        super().__init__(f"the trajectory is over: {stop.value}")
        self.stop = stop


@dataclass(frozen=True)
class Turn:
    """What `generate` gives: a turn of the model.

    text      what it wrote, without the token that ends it
    tokens    what it sampled, that token included
    logp      of each, under softmax(logits / temperature)
    stop      "stop": it ended by itself. "length": `max_tokens`, or its context's room, is used up
    calls     of the run's tools that it makes, to be answered: `tools.answers`
    room      how many tokens its context may still have
    number    from 0, in the order in which the loop asked for them
    ends      why a trajectory ends whose answer it is; None: it asks for tools' answers
    """

    text: str
    tokens: Sequence[int]
    logp: Sequence[float]
    stop: Literal["stop", "length"]
    calls: Sequence[Call]
    room: int
    number: int
    ends: Stop | None
    _context: Sequence[int] = field(repr=False)
    _length: int = field(repr=False)

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a message, to be put behind those that it answers."""
        return {"role": "assistant", "content": self.text}

    @property
    def ids(self) -> list[int]:
        """All token ids of its context: the prompt, what followed, and this turn."""
        return list(self._context[: self._length])


@dataclass(frozen=True)
class Ending:
    """What a loop may return: its answer, and what it gives for it.

    The reward counts for that turn, besides what tools gave: see `turn_rewards` of rewards.
    """

    turn: Turn
    reward: float | None = None


@dataclass(frozen=True)
class ToolAnswer:
    """What a tool answered: `text` is cut as a run's answers are, `status` says how it went.

    `reward` counts for the last turn. `done`: it says that the trajectory is over.
    """

    text: str
    status: str
    reward: float | None
    done: bool
