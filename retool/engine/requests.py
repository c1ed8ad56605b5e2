"""Sequences for samplers that only know requests: each turn becomes a request of its own, with all
tokens before it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from retool.engine.kernels.draws import seed_key
from retool.engine.types import Reason, SamplingParams, TurnDone

MOST_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Request:
    """A turn that is wanted: known by `name`, after `ids`, drawn with `seed`."""

    name: str
    ids: list[int]
    params: SamplingParams
    seed: int


@dataclass
class _Sequence:
    """All tokens so far; `request` is the turn under way."""

    ids: list[int]
    request: Request | None = None


class Requests:
    """Which sequences there are, and the turns of theirs that are under way.

    A sequence has at most `longest` tokens (0: no limit). One without room for another is refused:
    its turn ends at once, with no token.
    """

    def __init__(self, longest: int = 0) -> None:
        self.longest = longest
        self.refused: list[TurnDone] = []
        self._sequences: dict[Hashable, _Sequence] = {}
        self._under_way: dict[str, Hashable] = {}
        self._count = 0

    @property
    def idle(self) -> bool:
        """Whether no turn is under way, and none refused that nobody has been told of."""
        return not self._under_way and not self.refused

    @property
    def count(self) -> int:
        """Turns under way."""
        return len(self._under_way)

    def start(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> Request | None:
        """A new sequence's first turn; None where it was refused."""
        if key in self._sequences:
            raise ValueError(f"sequence {key!r} was started already: extend it, or drop it first.")
        self._sequences[key] = _Sequence(list(ids))
        return self._ask(key, params)

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> Request | None:
        """The next turn of a sequence; None where it was refused."""
        self._sequences[key].ids += ids
        return self._ask(key, params)

    def drop(self, key: Hashable) -> Request | None:
        """Forget a sequence; its turn that is under way, if one is."""
        sequence = self._sequences.pop(key)
        self.refused = [turn for turn in self.refused if turn.key != key]
        if sequence.request is not None:
            del self._under_way[sequence.request.name]
        return sequence.request

    def under_way(self, name: str) -> Request | None:
        """The request of this name, unless nobody wants it any more."""
        key = self._under_way.get(name)
        return None if key is None else self._sequences[key].request

    def forget(self) -> None:
        """Drop every sequence."""
        self._sequences.clear()
        self._under_way.clear()
        self.refused.clear()

    def finish(
        self, name: str, tokens: list[int], logp: list[float], reason: str
    ) -> TurnDone | None:
        """A request's result as a turn; None where nobody wants it any more.

        `reason`: "stop" or "length", and any other where the sampler gave up.
        """
        key = self._under_way.pop(name, None)
        if key is None:
            return None
        sequence = self._sequences[key]
        request = sequence.request
        assert request is not None
        sequence.request = None
        sequence.ids += tokens
        ended: Reason = "capacity"
        if reason == "stop":
            ended = "stop"
        # "length" with fewer tokens is the sampler's own limit: its cache or its longest sequence.
        elif reason == "length" and len(tokens) == request.params.max_tokens:
            ended = "length"
        behaviour = list(logp) if request.params.temperature else [0.0] * len(logp)
        return TurnDone(key, list(tokens), list(logp), behaviour, ended)

    def take_refused(self) -> list[TurnDone]:
        """Turns that had no room, once."""
        turns = self.refused
        self.refused = []
        return turns

    def _ask(self, key: Hashable, params: SamplingParams) -> Request | None:
        sequence = self._sequences[key]
        count = len(sequence.ids)
        if self.longest and count >= self.longest:
            self.refused.append(TurnDone(key, [], [], [], "capacity"))
            return None
        # Each turn draws with a seed of its own, as it is a request of its own
        seed = seed_key((*params.seed, count)) & MOST_SEED
        request = Request(str(self._count), list(sequence.ids), params, seed)
        self._count += 1
        sequence.request = request
        self._under_way[request.name] = key
        return request
