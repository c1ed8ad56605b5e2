"""An answer on its way: from the engine's turns to text that ends where it should.

[Note: stop texts] The engine knows tokens. Where a text ends an answer, it gives `PIECE_TOKENS` of
them at a time, and goes on if the text isn't there yet. A draw is a function of seed and position,
so pieces change nothing of what is drawn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from retool.engine import Sampler, TurnDone
from retool.engine import SamplingParams as TurnParams
from retool.llm.sampling import SamplingParams

FinishReason = Literal["stop", "length"]
PIECE_TOKENS = 16
HALF_A_CHARACTER = "\ufffd"  # what a decoder writes for bytes that are no whole one


class Detokenizer:
    """Token ids → text, as they come. `text` lacks what may still be half a character."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._tail: list[int] = []  # from a token before the last ones that were shown
        self._shown = 0  # of the tail
        self._before_last = 0  # characters before the last that were added

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; nothing is cleaned up."""
        return str(
            self._tokenizer.decode(
                list(ids),
                skip_special_tokens=self._skip,
                clean_up_tokenization_spaces=False,
            )
        )

    def add(self, ids: Sequence[int]) -> None:
        """Append tokens. A token's text may depend on the one before it, so both are decoded."""
        self._tail += ids
        # The difference of two texts, not the text of the new tokens: SentencePiece drops a space
        # at the beginning.
        before = self.decode(self._tail[: self._shown])
        after = self.decode(self._tail)
        # Its other half is still to come: shown now, it would have to be taken back.
        if after.endswith(HALF_A_CHARACTER):
            return
        self._before_last = len(self.text)
        self.text += after[len(before) :]
        self._tail = self._tail[self._shown :]
        self._shown = len(self._tail)

    def fresh(self, length: int) -> str:
        """Where a text of so many characters can be that wasn't there before the last `add`."""
        return self.text[max(0, self._before_last - length + 1) :]


@dataclass
class Answer:
    """One answer to one prompt. `limit` bounds its tokens, `end_ids` are tokens that end it.

    `text` and what ended it are there when `finish_reason` is.
    """

    key: tuple[int, int, int]  # call, prompt, sample
    prompt: list[int]
    params: SamplingParams
    seed: tuple[int, ...]
    limit: int
    end_ids: tuple[int, ...]
    detokenizer: Detokenizer
    piece: int | None = None  # tokens at a time, None: all of them
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def turn(self) -> TurnParams:
        """What the engine is to sample next."""
        params = self.params
        left = self.limit - len(self.ids)
        return TurnParams(
            max_tokens=left if self.piece is None else min(left, self.piece),
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            stop_ids=self.end_ids,
            seed=self.seed,
        )

    def take(self, turn: TurnDone) -> None:
        """Append what the engine sampled, and see whether the answer ends with it."""
        self.ids += turn.tokens
        self.logp += turn.logp
        last = self.ids[-1] if self.ids else None
        by_token = last in self.end_ids
        ended = by_token or len(self.ids) >= self.limit or turn.reason == "capacity"
        if self.piece is not None:
            self.detokenizer.add(turn.tokens)
            self.text = self._safe_text()
        if self._may_hold_stop(ended) and self._stop_at_text():
            return
        if by_token:
            asked = last in (self.params.stop_token_ids or ())
            self._finish("stop", last if asked else None, self.ids[:-1])
        elif ended:
            self._finish("length", None, self.ids)

    def _may_hold_stop(self, ended: bool) -> bool:
        """Whether to look for a stop text in all of the answer: one was seen at its end, or the end
        may not have been shown whole.
        """
        stops = self.params.stop_texts
        if ended or not stops:
            return bool(stops)
        return any(stop in self.detokenizer.fresh(len(stop)) for stop in stops)

    def _stop_at_text(self) -> bool:
        """Whether a stop text is there; then the answer ends with the token that completes it."""
        decode = self.detokenizer.decode
        whole = decode(self.ids)
        found = [(whole.find(stop), stop) for stop in self.params.stop_texts if stop in whole]
        if not found:
            return False
        # The first to be complete ends the answer, as it would have done token by token
        place, stop = min(found, key=lambda entry: entry[0] + len(entry[1]))
        counts = range(len(self.ids) + 1)
        # Once the text is there it stays: a few decodings find the token that completes it.
        count = bisect_left(counts, True, key=lambda k: stop in decode(self.ids[:k]))
        self.ids = self.ids[:count]
        self.logp = self.logp[:count]
        end = place + len(stop) if self.params.include_stop_str_in_output else place
        self.text = whole[:end]
        self.finish_reason = "stop"
        self.stop_reason = stop
        return True

    def _finish(self, why: FinishReason, by: int | None, shown: Sequence[int]) -> None:
        self.finish_reason = why
        self.stop_reason = by
        # A stop token of the user's is text unless it is special
        self.text = self.detokenizer.decode(self.ids if by is not None else shown)

    def _safe_text(self) -> str:
        """The text so far, but for an end that may be the beginning of a stop text."""
        text = self.detokenizer.text
        longest = max(map(len, self.params.stop_texts), default=0)
        # The longest such end first.
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.params.stop_texts):
                return text[:start]
        return text


def run(
    engine: Sampler, answers: Sequence[Answer], under_way: dict[Hashable, Answer]
) -> Generator[None]:
    """Sample `answers`, and give the caller a turn whenever some have grown.

    `under_way` are all that the engine samples, by key: those of another `run` grow meanwhile. However
    this ends, the engine has forgotten its own.
    """
    mine = {answer.key for answer in answers}
    try:
        for answer in answers:
            engine.start(answer.key, answer.prompt, answer.turn(), group=answer.key[:2])
            under_way[answer.key] = answer
        while not mine.isdisjoint(under_way):
            turns = engine.step()
            for turn in turns:
                answer = under_way[turn.key]
                answer.take(turn)
                if answer.finish_reason is None:
                    engine.extend(turn.key, [], answer.turn())
                else:
                    del under_way[turn.key]
                    engine.drop(turn.key)
            # Not before all have their turn: whoever called may not come back
            if any(turn.key in mine for turn in turns):
                yield
    # Also when the caller stops reading: what nobody waits for takes no room in the cache.
    finally:
        for key in mine & under_way.keys():
            del under_way[key]
            engine.drop(key)
