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

from retool.engine.schedule.sequence import Item, Sequence, Step, StepAhead


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
    copies: list[tuple[int, int]]
    each_alone: bool

    @property
    def filtered(self) -> bool:
        return bool(((self.top_k > 0) | (self.top_p < 1))[self.temperature > 0].any())


def make_batch(
    step: Step, page_size: int, multiple: int, all_rows: bool, expand: bool
) -> tuple[Batch, list[Sequence | None]]:
    """The arrays of a step, tokens padded to a `multiple`, and the sequence that each row draws
    for.

    `all_rows`: where nothing but single tokens is computed, or with `expand`, all of them are rows
    (None where nothing is drawn), so that shapes depend on the number of tokens alone.
    """
    items = step.items
    singles = [i for i in items if i.count == 1]
    chunks = [i for i in items if i.count > 1]
    if expand:
        singles = [Item(i.sequence, n, 1) for i in items for n in range(i.start, i.start + i.count)]
        chunks = []
    padding = -sum(i.count for i in items) % multiple
    decode = len(singles) + padding
    width = max((i.start + i.count - 1) // page_size + 1 for i in items)
    tables = np.zeros((decode + len(chunks), width), np.int32)
    for place, item in [*enumerate(singles), *enumerate(chunks, decode)]:
        pages = item.sequence.pages[:width]
        tables[place, : len(pages)] = pages
    starts = np.array(
        [*(i.start for i in singles), *[0] * padding, *(i.start for i in chunks)], np.int64
    )
    counts = np.array([1] * decode + [i.count for i in chunks], np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    positions = starts[owner] + np.arange(len(owner)) - first[owner]
    slots = (
        tables[owner, positions // page_size].astype(np.int64) * page_size + positions % page_size
    )
    tokens = np.zeros(len(owner), np.int64)
    for place, item in [*enumerate(singles), *enumerate(chunks, decode)]:
        at = first[place]
        tokens[at : at + item.count] = item.sequence.tokens[item.start : item.start + item.count]
    drawing: list[tuple[int, Sequence | None]] = [
        (n, i.sequence if i.draws else None) for n, i in enumerate(singles)
    ]
    if all_rows and not chunks:
        drawing += [(n, None) for n in range(len(singles), decode)]
    else:
        drawing += [
            (int(first[decode + n] + i.count - 1), i.sequence if i.draws else None)
            for n, i in enumerate(chunks)
        ]
        drawing = [d for d in drawing if d[1] is not None]
    params = [None if s is None else s.params for _, s in drawing]
    return Batch(
        tokens,
        positions,
        slots,
        tables,
        (starts + counts).astype(np.int32),
        counts,
        decode,
        rows=np.array([row for row, _ in drawing], np.int64),
        keys=np.array([0 if s is None else s.draw_key for _, s in drawing], np.int64),
        temperature=np.array([0 if p is None else p.temperature for p in params], np.float32),
        top_k=np.array([-1 if p is None else p.top_k for p in params], np.int64),
        top_p=np.array([1 if p is None else p.top_p for p in params], np.float32),
        copies=step.copies,
        each_alone=expand,
    ), [s for _, s in drawing]


@dataclass(frozen=True)
class Change:
    """What becomes of a decode step's rows before it is repeated, in this order: pages are copied,
    rows that are `over` become padding, pages are added to others, and sequences join. `slots`:
    rows in use then; `anew`: what was in them before is forgotten; without `runs` it isn't repeated
    yet.
    """

    runs: bool
    slots: int
    anew: bool
    copies: list[tuple[int, int]]
    over: np.ndarray  # int64 [·]
    added: np.ndarray  # int64 [3, ·]: row, place in its page table, page
    # int64 [6, J]: row, the chunks' draw that is its token or -1, token, position, key, top-k
    joins: np.ndarray
    chances: np.ndarray  # float32 [2, J]: temperature, top-p
    tables: np.ndarray  # int32 [J, W]

    @property
    def filtered(self) -> bool:
        return bool(((self.joins[5] > 0) | (self.chances[1] < 1))[self.chances[0] > 0].any())


def make_change(step: StepAhead, over: list[int], anew: bool) -> Change:
    """The arrays of a repeated step."""
    who = [join.sequence for join in step.joins]
    positions = [join.position for join in step.joins]
    tokens = [
        0 if join.source is not None else s.tokens[n]
        for join, s, n in zip(step.joins, who, positions, strict=True)
    ]
    tables = np.zeros((len(who), max((len(s.pages) for s in who), default=0)), np.int32)
    for place, s in enumerate(who):
        tables[place, : len(s.pages)] = s.pages
    sources = [-1 if join.source is None else join.source for join in step.joins]
    keys = [s.draw_key for s in who]
    top_k = [s.params.top_k for s in who]
    return Change(
        step.runs,
        len(step.rows),
        anew,
        step.copies,
        np.array(over, np.int64),
        np.array(step.added, np.int64).reshape(-1, 3).T.copy(),
        np.array(
            [[join.slot for join in step.joins], sources, tokens, positions, keys, top_k], np.int64
        ),
        np.array([[s.params.temperature for s in who], [s.params.top_p for s in who]], np.float32),
        tables,
    )
