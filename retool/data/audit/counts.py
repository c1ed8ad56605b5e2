"""What the audit counts.

Tallies of chunks add up, and hold histograms and a few samples, never the rows: memory stays
bounded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retool.batch import Sample
from retool.data.audit.samples import Shown, sample_pieces, shown_sample
from retool.data.read.chunk import Chunk, RowError
from retool.data.read.raw_messages import prompt_messages
from retool.data.read.refused_rows import kind_of
from retool.data.read.row_format import RowFormat
from retool.data.read.rows import (
    TOO_DEEP,
    Conversation,
    to_conversation,
    undeclared_calls,
)
from retool.data.render.renderer import ROWS_A_CHECK, Renderer
from retool.data.template.completeness import unread_fields
from retool.data.tokenise import LengthLimit
from retool.data.tokens.encoder import Piece

KEPT_REFUSALS = 500
PLACES_NAMED = 3
LONGEST_REASON = 400  # characters


@dataclass
class Tally:
    """Counts over rows.

    `lengths` (tokens) and `shares` (percent trained) are histograms value → samples; `turns` and
    `calls_per_row` value → rows.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    split: int = 0
    truncated: int = 0
    dropped_long: int = 0
    dropped_untrained: int = 0
    refused: int = 0
    refused_long: int = 0  # of these, as too long under truncation=error
    piecewise_differs: int = 0  # samples whose pieces give other tokens than one pass over the text
    control_text: int = 0  # rows in which somebody's text holds a control token, which stays text
    # Trained turns without what the row says was thought (data.drop_reasoning)
    dropped_thoughts: int = 0
    open_thoughts: int = 0  # trained turns that open a thought and don't close it
    masked_outputs: int = 0
    empty_turns: int = 0  # assistant turns without text or call
    lengths: Counter[int] = field(default_factory=Counter)
    shares: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    calls_per_row: Counter[int] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    # Messages with a field (role.field) that nothing reads
    unread: Counter[str] = field(default_factory=Counter)
    # Of these, calls to tools that the row's `tools` doesn't declare
    undeclared: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    refusals: list[str] = field(default_factory=list)
    open_places: list[str] = field(default_factory=list)  # where some such turns are
    shown: list[Shown] = field(default_factory=list)

    def add(self, other: Tally, show: int) -> None:
        """Add another tally, keeping `show` samples."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, Counter):
                getattr(self, name).update(value)
        self.refusals += other.refusals[: KEPT_REFUSALS - len(self.refusals)]
        self.open_places += other.open_places[: PLACES_NAMED - len(self.open_places)]
        self.shown = sorted([*self.shown, *other.shown], key=lambda sample: sample.key)[:show]

    def refuse(self, why: str) -> None:
        self.refused += 1
        self.reasons[kind_of(why)] += 1
        if len(self.refusals) < KEPT_REFUSALS:
            self.refusals.append(why if len(why) <= LONGEST_REASON else why[:LONGEST_REASON] + "…")


def percentile(histogram: Counter[int], share: float) -> int:
    """The smallest value that at least `share` of the entries don't exceed (nearest rank).

    0 where there are none.
    """
    left = share * sum(histogram.values())
    for value in sorted(histogram):
        left -= histogram[value]
        if left <= 0:
            return value
    return max(histogram, default=0)


def tally_chunk(
    chunk: Chunk,
    renderer: Renderer,
    form: RowFormat,
    prompts: bool,
    limit: LengthLimit,
    show: int,
) -> Tally:
    """Audit every row of a chunk.

    `prompts`: the rows are RL prompts, which have nothing to train.
    """
    tally = Tally()
    candidates: list[tuple[str, Conversation]] = []
    for index, raw in chunk:
        tally.rows += 1
        try:
            if isinstance(raw, RowError):
                raise raw
            row = _asked(raw, form, f"{chunk.file}, row {index}") if prompts else raw
            conversation = to_conversation(row, chunk.file, index, form, prompt_only=prompts)
            _count_row(tally, conversation, renderer, prompts, limit)
        except RowError as error:
            tally.refuse(str(error))
        except ValueError as error:
            tally.refuse(f"{chunk.file}, row {index}: {error}")
        except RecursionError:
            tally.refuse(f"{chunk.file}, row {index}: {TOO_DEEP}")
        else:
            candidates.append((_sort_key(chunk.file, index), conversation))
    candidates.sort(key=lambda candidate: candidate[0])
    for key, conversation in candidates[:show]:
        tally.shown.append(shown_sample(key, conversation, renderer, prompts, limit))
    return tally


def _sort_key(file: str, row: int) -> str:
    """Sorts rows at random, in every run the same way."""
    return hashlib.sha256(f"{file}:{row}".encode()).hexdigest()[:16]


def _asked(row: Mapping[str, Any], form: RowFormat, where: str) -> Mapping[str, Any]:
    """A row of RL prompts with its prompt as messages."""
    key = form.messages_key
    return {**row, key: prompt_messages(row[key], key, where)} if key in row else row


def _count_row(
    tally: Tally,
    conversation: Conversation,
    renderer: Renderer,
    prompts: bool,
    limit: LengthLimit,
) -> None:
    """Count a row and its samples. Raises ValueError, with nothing counted, for a refused one."""
    pieces = sample_pieces(renderer, conversation, prompts)
    checked = conversation.row % ROWS_A_CHECK == 0
    samples = [renderer.tokenise(parts, checked) for parts in pieces]
    too_long = any(len(sample) > limit.max_length for sample in samples)
    tally.refused_long += too_long and limit.truncation == "error"
    kept = [limit.cut(sample) for sample in samples]
    # Nothing else is counted before here: a refused row must leave no trace but its refusal.
    for parts, whole, sample in zip(pieces, samples, kept, strict=True):
        _count_sample(tally, whole, sample, prompts)
        if len(parts) > 1:
            in_one_pass = renderer.encoder.encode([_without_cuts(parts)])[0]
            tally.piecewise_differs += in_one_pass != whole.tokens.tolist()
    tally.split += len(samples) > 1
    tally.unread.update(unread_fields(conversation, renderer.source))
    tally.control_text += any(piece.quoted for parts in pieces for piece in parts)
    if not prompts:
        tally.dropped_thoughts += renderer.dropped_thoughts(conversation)
        _count_open_thoughts(tally, conversation, renderer)
        tally.masked_outputs += renderer.masked_outputs(conversation)
    _count_messages(tally, conversation)


def _count_open_thoughts(tally: Tally, conversation: Conversation, renderer: Renderer) -> None:
    messages = renderer.open_thoughts(conversation)
    tally.open_thoughts += len(messages)
    for i in messages[: PLACES_NAMED - len(tally.open_places)]:
        tally.open_places.append(f"{conversation.file}, row {conversation.row}, message {i}")


def _count_messages(tally: Tally, conversation: Conversation) -> None:
    calls: list[str] = []
    for message in conversation.messages:
        calls += [call["function"]["name"] for call in message.get("tool_calls", [])]
        is_silent = not message["content"].strip() and "tool_calls" not in message
        tally.empty_turns += message["role"] == "assistant" and is_silent
        tally.roles[message["role"]] += 1
    tally.turns[len(conversation.assistant_turns)] += 1
    tally.calls.update(calls)
    tally.calls_per_row[len(calls)] += 1
    tally.undeclared.update(undeclared_calls(conversation))


def _count_sample(tally: Tally, whole: Sample, sample: Sample | None, prompts: bool) -> None:
    tally.lengths[len(whole)] += 1
    if sample is None:
        tally.dropped_long += 1
    elif sample.trained == 0 and not prompts:
        tally.dropped_untrained += 1
    else:
        tally.samples += 1
        tally.tokens += len(sample)
        tally.trained_tokens += sample.trained
        tally.truncated += len(sample) < len(whole)
        tally.shares[round(100 * sample.trained / len(sample))] += 1


def _without_cuts(pieces: Sequence[Piece]) -> Piece:
    """All pieces as one, as a tokenizer that is given the whole text would see it."""
    text = ""
    quoted = []
    for piece in pieces:
        quoted += [(len(text) + start, len(text) + end) for start, end in piece.quoted]
        text += piece.text
    return Piece(text, quoted=tuple(quoted))
