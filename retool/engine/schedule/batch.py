"""A step's work as arrays: what rank 0 of a tensor-parallel group sends to the others, and what the
device needs.

    tokens      | decode items, 1 each | padding, 1 each | chunk items, several each |
    rows        of tokens at whose place a next one is drawn

With `expand`, each token of a chunk is an item of its own (they are written before anyone attends,
so it sees those before it).

Legend: T tokens · S items · W pages of the longest sequence · R rows · J rows that join a step that
is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retool.engine.schedule.pages import PageCopy
from retool.engine.schedule.sequence import Item, Sequence, Step, StepAhead
from retool.engine.types import SamplingParams

PADDING_PARAMS = SamplingParams(max_tokens=1, temperature=0.0)  # of rows that draw for nobody


@dataclass(frozen=True)
class Batch:
    """Arrays of one forward. Padding items have token 0 at position 0 and write to page 0."""

    tokens: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]
    slots: np.ndarray  # int64 [T]
    tables: np.ndarray  # int32 [S, W]
    lengths: np.ndarray  # int32 [S]
    counts: np.ndarray  # int64 [S]
    decode: int  # items of one token, padding included
    rows: np.ndarray  # int64 [R]
    keys: np.ndarray  # int64 [R]
    temperature: np.ndarray  # float32 [R]
    top_k: np.ndarray  # int64 [R]
    top_p: np.ndarray  # float32 [R]
    copies: list[PageCopy]
    each_alone: bool

    @property
    def filtered(self) -> bool:
        return any_filter(self.temperature, self.top_k, self.top_p)


def any_filter(temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> bool:
    """Whether in any row some tokens can't be drawn for another reason than their probability."""
    filters = (top_k > 0) | (top_p < 1)
    return bool(filters[temperature > 0].any())


def make_batch(
    step: Step, page_size: int, multiple: int, all_rows: bool, expand: bool
) -> tuple[Batch, list[Sequence | None]]:
    """The arrays of a step, tokens padded to a `multiple`, and the sequence that each row draws
    for.

    `all_rows`: where nothing but single tokens is computed, or with `expand`, all of them are rows
    (None where nothing is drawn), so that shapes depend on the number of tokens alone.
    """
    singles, chunks = _by_kind(step.items, expand)
    padding = -sum(item.count for item in step.items) % multiple
    decode = len(singles) + padding
    at = [*enumerate(singles), *enumerate(chunks, decode)]  # items with their numbers

    tables = _page_tables(at, decode + len(chunks), page_size)
    of_chunks = [item.start for item in chunks]
    starts = np.array([item.start for item in singles] + [0] * padding + of_chunks, np.int64)
    counts = np.array([1] * decode + [item.count for item in chunks], np.int64)

    # Of every token: its item, and how far into that it is
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    positions = starts[owner] + np.arange(len(owner)) - (ends - counts)[owner]
    pages = tables[owner, positions // page_size].astype(np.int64)

    tokens = np.zeros(len(owner), np.int64)
    lasts = (ends - 1).tolist()
    for number, item in at:
        end = lasts[number] + 1
        stop = item.start + item.count
        tokens[end - item.count : end] = item.sequence.tokens[item.start : stop]

    # A row is an item's last token; who it draws for, if anybody
    drawing = [(lasts[number], item.sequence if item.draws else None) for number, item in at]
    if all_rows and not chunks:
        drawing += [(row, None) for row in range(len(singles), decode)]
    else:
        drawing = [(row, sequence) for row, sequence in drawing if sequence is not None]
    sequences = [sequence for _, sequence in drawing]
    params = [PADDING_PARAMS if s is None else s.params for s in sequences]
    batch = Batch(
        tokens=tokens,
        positions=positions,
        slots=pages * page_size + positions % page_size,
        tables=tables,
        lengths=(starts + counts).astype(np.int32),
        counts=counts,
        decode=decode,
        rows=np.array([row for row, _ in drawing], np.int64),
        keys=np.array([0 if s is None else s.draw_key for s in sequences], np.int64),
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int64),
        top_p=np.array([p.top_p for p in params], np.float32),
        copies=step.copies,
        each_alone=expand,
    )
    return batch, sequences


def _by_kind(items: list[Item], expand: bool) -> tuple[list[Item], list[Item]]:
    """Items of a single token, and chunks; with `expand` each token is an item of its own."""
    if not expand:
        return [i for i in items if i.count == 1], [i for i in items if i.count > 1]
    singles = [
        Item(item.sequence, place, 1)
        for item in items
        for place in range(item.start, item.start + item.count)
    ]
    return singles, []


def _page_tables(at: list[tuple[int, Item]], items: int, page_size: int) -> np.ndarray:
    """int32 [S, W]: each item's pages up to its last token; padding has page 0."""
    width = max((item.start + item.count - 1) // page_size + 1 for _, item in at)
    tables = np.zeros((items, width), np.int32)
    for number, item in at:
        pages = item.sequence.pages[:width]
        tables[number, : len(pages)] = pages
    return tables


@dataclass(frozen=True)
class Change:
    """What becomes of a decode step's rows before it is repeated, in this order: pages are copied,
    rows that are `over` become padding, pages are added to others, and sequences join.

    `slots`: rows in use then. `anew`: what was in them before is forgotten. Without `runs` it isn't
    repeated yet.
    """

    runs: bool
    slots: int
    anew: bool
    copies: list[PageCopy]
    over: np.ndarray  # int64 [·]
    added: np.ndarray  # int64 [3, ·]: row, place in its page table, page
    # int64 [6, J]: row, the chunks' draw that is its token or -1, token, position, key, top-k
    joins: np.ndarray
    chances: np.ndarray  # float32 [2, J]: temperature, top-p
    tables: np.ndarray  # int32 [J, W]

    @property
    def filtered(self) -> bool:
        temperature, top_p = self.chances
        return any_filter(temperature, self.joins[5], top_p)


def make_change(step: StepAhead, over: list[int], anew: bool) -> Change:
    """The arrays of a repeated step."""
    joining = [join.sequence for join in step.joins]
    joins = [
        [join.slot for join in step.joins],
        [-1 if join.source is None else join.source for join in step.joins],
        # Not there yet where the chunks' draw is the token
        [0 if j.source is not None else j.sequence.tokens[j.position] for j in step.joins],
        [join.position for join in step.joins],
        [s.draw_key for s in joining],
        [s.params.top_k for s in joining],
    ]
    chances = [[s.params.temperature for s in joining], [s.params.top_p for s in joining]]
    width = max((len(s.pages) for s in joining), default=0)
    tables = np.zeros((len(joining), width), np.int32)
    for number, s in enumerate(joining):
        tables[number, : len(s.pages)] = s.pages
    return Change(
        runs=step.runs,
        slots=len(step.rows),
        anew=anew,
        copies=step.copies,
        over=np.array(over, np.int64),
        added=np.array(step.added, np.int64).reshape(-1, 3).T.copy(),
        joins=np.array(joins, np.int64),
        chances=np.array(chances, np.float32),
        tables=tables,
    )
