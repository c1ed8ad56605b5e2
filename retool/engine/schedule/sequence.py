"""What the scheduler knows of a sequence, of a group of samples, and of one step's work."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from retool.engine.schedule.pages import PageCopy
from retool.engine.types import Reason, SamplingParams


class State(Enum):
    """Waiting to be computed, being computed, its turn finished and its KV kept, or gone."""

    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    DROPPED = "dropped"


# An enum's own attribute takes Python long, and this one is asked for by each row in each step
RUNNING = State.RUNNING


@dataclass(eq=False)
class Group:
    """Samples of one prompt, of which `live` aren't dropped yet.

    All but the prompt's last token is computed once, by `leader`. `pages` then keep it for those who
    still wait.
    """

    key: Hashable
    ids: list[int]
    live: int = 0
    unserved: int = 0  # members that never had their prompt's KV
    leader: Sequence | None = None
    pages: list[int] = field(default_factory=list)

    @property
    def prefix(self) -> int:
        """Tokens that are shared."""
        return len(self.ids) - 1


# Compared by identity: two samples may have the same tokens so far
@dataclass(eq=False)
class Sequence:
    """Tokens of a trajectory so far; `computed` of them have keys and values in `pages`.

    Of the first `told` tokens it was told which experts computed them. `number` counts arrivals:
    the lower one goes first, for room and for memory. `draw_key` is the key of its seed. This
    turn's tokens begin at `turn_start`. For the statistics: tokens [0, given) were not sampled in
    this turn, or were computed before. `served`: it once had its group's prompt.
    """

    key: Hashable
    number: int
    tokens: list[int]
    params: SamplingParams
    draw_key: int
    group: Group | None
    turn_start: int
    given: int
    served: bool = False
    computed: int = 0
    told: int = 0
    state: State = State.WAITING
    pages: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    logp_behaviour: list[float] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def is_running(self) -> bool:
        return self.state is RUNNING

    @property
    def draws_last(self) -> bool:
        """Whether the draw that follows what is computed is the turn's last one at any rate."""
        return self.computed - self.turn_start >= self.params.max_tokens - 1

    def append(
        self, token: int, logp: float, logp_behaviour: float, max_length: int
    ) -> Reason | None:
        """Add a drawn token: why the turn is over with it, or None if it goes on."""
        self.tokens.append(token)
        self.logp.append(logp)
        self.logp_behaviour.append(logp_behaviour)
        params = self.params
        if token in params.stop_ids:
            return "stop"
        if len(self.logp) >= params.max_tokens:
            return "length"
        return "capacity" if len(self.tokens) > max_length else None


@dataclass(frozen=True)
class Item:
    """Tokens [start, start + count) of a sequence go through the model; if that is all there are,
    the next one is drawn.
    """

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)


class Step(NamedTuple):
    """Work of one forward: items, those of one token first. `copies` of pages come before."""

    items: list[Item]
    copies: list[PageCopy]


class Join(NamedTuple):
    """A sequence takes the row `slot` of a decode step that runs ahead.

    It computes the token at `position` there. The host may not have seen that token yet: then it is
    draw number `source` of the last step's chunks (None: it is known).
    """

    slot: int
    sequence: Sequence
    source: int | None
    position: int


class StepAhead(NamedTuple):
    """A decode step that is planned before the draws of the last one were seen.

    `rows` has who is in which row (None: padding). For rows that go on, `added` pages as (row, place
    in its page table, page); for the others, who `joins`. `copies` of pages come first, and `chunks`
    are computed beside it. Without `runs` the rows only get ready, and the chunks are all there is.
    """

    runs: bool
    rows: list[Sequence | None]
    added: list[tuple[int, int, int]]
    joins: list[Join]
    copies: list[PageCopy]
    chunks: list[Item]

    def join(self, sequence: Sequence, source: int | None, position: int) -> None:
        """Take the first free row."""
        rows = self.rows
        # Those before the last one taken aren't free
        begin = self.joins[-1].slot + 1 if self.joins else 0
        slot = next((slot for slot in range(begin, len(rows)) if rows[slot] is None), len(rows))
        self.rows[slot : slot + 1] = [sequence]
        self.joins.append(Join(slot, sequence, source, position))
