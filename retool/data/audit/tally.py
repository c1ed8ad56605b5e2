"""What the audit counts.

Tallies of chunks add up, and hold histograms and a few samples, never the rows: memory stays
bounded.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from retool.batch import Sample
from retool.data.read.files import Chunk, RowError
from retool.data.read.quoting import PRIVATE_TEXT
from retool.data.read.refusals import kind_of
from retool.data.read.rows import (
    TOO_DEEP,
    Conversation,
    RowFormat,
    to_conversation,
    undeclared_calls,
)
from retool.data.render.accounting import unread_fields
from retool.data.render.limits import bounded
from retool.data.render.renderer import ROWS_A_CHECK, Piece, Renderer
from retool.data.tokenise import truncate

KINDS = ("trained", "context", "tool", "template", "masked")
KEPT_REFUSALS = 500
LONGEST_REASON = 400
FIRST_MARK = "\U00100000"
MOST_MARKED = 1_000
MARKS = re.compile(f"([{FIRST_MARK}-{chr(ord(FIRST_MARK) + MOST_MARKED)}])")


@dataclass(frozen=True)
class Shown:
    """One sample to look at: its tokens as (text, index into KINDS).

    `key` orders samples at random, the same in every run.
    """

    key: str
    file: str
    row: int
    tokens: list[tuple[str, int]]
    length: int
    trained: int
    turns: int
    calls: int


@dataclass
class Tally:
    """Counts over rows; `lengths`, `shares` (percent trained), `turns` and `calls_per_row` are
    histograms value → rows.
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
    dropped_thoughts: int = (
        0  # trained turns without what the row says was thought (data.drop_reasoning)
    )
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
    shown: list[Shown] = field(default_factory=list)

    def add(self, other: Tally, show: int) -> None:
        """Add another tally, keeping `show` samples."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, Counter):
                getattr(self, name).update(value)
        self.refusals += other.refusals[: KEPT_REFUSALS - len(self.refusals)]
        self.shown = sorted([*self.shown, *other.shown], key=lambda sample: sample.key)[:show]

    def refuse(self, why: str) -> None:
        self.refused += 1
        self.reasons[kind_of(why)] += 1
        if len(self.refusals) < KEPT_REFUSALS:
            self.refusals.append(why if len(why) <= LONGEST_REASON else why[:LONGEST_REASON] + "…")


def percentile(histogram: Counter[int], share: float) -> int:
    """The smallest value that at least `share` of the entries don't exceed (nearest rank); 0 of
    nothing.
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
    max_length: int,
    truncation: str,
    history: str,
    show: int,
) -> Tally:
    """Audit every row of a chunk.

    `prompts`: the rows are RL prompts, which have nothing to train.
    """
    tally = Tally()
    candidates = []
    for index, raw in chunk:
        tally.rows += 1
        try:
            if isinstance(raw, RowError):
                raise raw
            conversation = to_conversation(raw, chunk.file, index, form, prompt_only=prompts)
            _count_row(tally, conversation, renderer, prompts, max_length, truncation, history)
        except (ValueError, RecursionError) as error:
            said = TOO_DEEP if isinstance(error, RecursionError) else error
            why = (
                str(error) if isinstance(error, RowError) else f"{chunk.file}, row {index}: {said}"
            )
            tally.refuse(why)
            continue
        candidates.append(
            (hashlib.sha256(f"{chunk.file}:{index}".encode()).hexdigest()[:16], conversation)
        )
    for key, conversation in sorted(candidates, key=lambda entry: entry[0])[:show]:
        tally.shown.append(
            _show(key, conversation, renderer, prompts, history, max_length, truncation)
        )
    return tally


def _count_row(
    tally: Tally,
    conversation: Conversation,
    renderer: Renderer,
    prompts: bool,
    max_length: int,
    truncation: str,
    history: str,
) -> None:
    pieces = sample_pieces(renderer, conversation, prompts, history)
    checked = conversation.row % ROWS_A_CHECK == 0
    samples = [renderer.tokenise(parts, checked) for parts in pieces]
    tally.refused_long += truncation == "error" and any(
        len(sample) > max_length for sample in samples
    )
    kept = [truncate(sample, max_length, truncation) for sample in samples]
    # Nothing else is counted before here: a refused row must leave no trace but its refusal.
    for parts, whole, sample in zip(pieces, samples, kept, strict=True):
        _count_sample(tally, whole, sample, prompts)
        tally.piecewise_differs += (
            len(parts) > 1 and renderer.encoder.encode([joined(parts)])[0] != whole.tokens.tolist()
        )
    messages = conversation.messages
    calls = [
        call["function"]["name"] for message in messages for call in message.get("tool_calls", [])
    ]
    tally.split += len(samples) > 1
    tally.roles.update(message["role"] for message in messages)
    tally.turns[len(conversation.assistant_turns)] += 1
    tally.calls.update(calls)
    tally.undeclared.update(undeclared_calls(conversation))
    tally.calls_per_row[len(calls)] += 1
    tally.unread.update(unread_fields(conversation, renderer.source))
    tally.dropped_thoughts += 0 if prompts else renderer.dropped_thoughts(conversation)
    tally.control_text += any(piece.quoted for parts in pieces for piece in parts)
    tally.empty_turns += sum(
        m["role"] == "assistant" and not m["content"].strip() and "tool_calls" not in m
        for m in messages
    )


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


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces as one."""
    text = ""
    quoted = []
    for piece in pieces:
        quoted += [(len(text) + start, len(text) + end) for start, end in piece.quoted]
        text += piece.text
    return Piece(text, quoted=tuple(quoted))


def sample_pieces(
    renderer: Renderer, conversation: Conversation, prompts: bool, history: str
) -> list[list[Piece]]:
    """The pieces of every sample; of an RL prompt its one render, generation prompt included."""
    with bounded():  # once for all that is rendered
        return (
            [renderer.prompt_pieces(conversation)]
            if prompts
            else renderer.pieces(conversation, history)
        )


def _show(
    key: str,
    conversation: Conversation,
    renderer: Renderer,
    prompts: bool,
    history: str,
    max_length: int,
    truncation: str,
) -> Shown:
    """The sample (of several, the last) with what truncation leaves of it; one that would be
    dropped is shown whole.
    """
    pieces = sample_pieces(renderer, conversation, prompts, history)[-1]
    colours = colour(pieces, renderer, conversation, prompts, history)
    tokens: list[tuple[str, int]] = []
    at = 0
    for piece in pieces:
        offsets = renderer.encoder.offsets(piece, begins=at == 0)
        shown_to = 0
        for _, end in offsets:  # a character of several tokens is shown with the first of them
            first = min(shown_to, len(piece.text) - 1)
            tokens.append((piece.text[shown_to:end], colours[at + first]))
            shown_to = max(shown_to, end)
        at += len(piece.text)
    whole = renderer.tokenise(pieces)
    sample = truncate(whole, max_length, truncation) or whole
    if len(tokens) == len(whole):
        tokens = (
            tokens[: len(sample)] if truncation == "right" else tokens[len(whole) - len(sample) :]
        )
    calls = sum(len(message.get("tool_calls", [])) for message in conversation.messages)
    turns = len(conversation.assistant_turns)
    return Shown(
        key, conversation.file, conversation.row, tokens, len(sample), sample.trained, turns, calls
    )


def colour(
    pieces: Sequence[Piece],
    renderer: Renderer,
    conversation: Conversation,
    prompts: bool,
    history: str,
) -> bytearray:
    """For each character of the text the index of its kind: what messages say is theirs, the rest
    is the template's.
    """
    text = "".join(piece.text for piece in pieces)
    colours = bytearray([KINDS.index("template")]) * len(text)
    places = _marked_places(text, renderer, conversation, prompts, history) or _found_places(
        text, conversation
    )
    for message, (start, end) in places:
        kind = "tool" if conversation.messages[message]["role"] == "tool" else "context"
        colours[start:end] = bytes([KINDS.index(kind)]) * (end - start)
    at = 0
    for piece in pieces:
        if piece.turn is not None:
            colours[at : at + len(piece.text)] = bytes(
                [KINDS.index("trained" if piece.trained else "masked")]
            ) * len(piece.text)
        at += len(piece.text)
    return colours


def _marked_places(
    text: str, renderer: Renderer, conversation: Conversation, prompts: bool, history: str
) -> list[tuple[int, tuple[int, int]]]:
    """(message, where its words stand), from a render in which a character of its own stands before
    and after the words of each message.

    Nothing where that changes the text otherwise.
    """
    said = [message["content"] for message in conversation.messages]
    first_mark = ord(FIRST_MARK)
    if PRIVATE_TEXT.search("".join(said)) or len(said) > MOST_MARKED:
        return []
    marked = [
        message
        if message["role"] == "assistant"
        else {**message, "content": _marked(message["content"], chr(first_mark + i))}
        for i, message in enumerate(conversation.messages)
    ]
    try:
        pieces = sample_pieces(renderer, replace(conversation, messages=marked), prompts, history)[
            -1
        ]
    except ValueError:
        return []
    parts = MARKS.split("".join(piece.text for piece in pieces))  # text, mark, text, mark, …, text
    if "".join(parts[::2]) != text:
        return []
    places: list[tuple[int, tuple[int, int]]] = []
    opened: dict[str, int] = {}
    at = 0
    for words, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
        at += len(words)
        if mark and mark in opened:
            places.append((ord(mark) - first_mark, (opened.pop(mark), at)))
        elif mark:
            opened[mark] = at
    return places


def _marked(text: str, mark: str) -> str:
    """The text with a mark on each side of its words; white space stays outside, for a template to
    strip.
    """
    words = text.strip()
    return text.replace(words, mark + words + mark, 1) if words else text


def _found_places(text: str, conversation: Conversation) -> list[tuple[int, tuple[int, int]]]:
    """(message, where its words stand): looked for in order, which can be mistaken where the
    template says the same before.
    """
    places: list[tuple[int, tuple[int, int]]] = []
    at = 0
    for i, message in enumerate(conversation.messages):
        said = message["content"].strip()
        found = text.find(said, at) if said and message["role"] != "assistant" else -1
        if found >= 0:
            at = found + len(said)
            places.append((i, (found, at)))
    return places
