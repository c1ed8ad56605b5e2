"""The next decode step, planned before the draws of the last one were seen.

A decode step can be repeated blindly: its rows, one token further. A row whose turn turns out to be
over is then computed in vain, which is cheaper than stopping the device for every end.

    plan_ahead = decide (pure: what the next step is) + book (take pages, count tokens)

Where chunks have kernels of their own (`apart`), newcomers are computed beside such a step and join
the rows of the next one, with draws that the host hasn't seen either. They are admitted several at a
time, or after `MAX_STEPS_TO_WAIT` steps. While there is more to compute for them than a step takes,
the rows that decode wait: they would only make the last of all come later.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from retool.engine.schedule.scheduler import Scheduler
from retool.engine.schedule.sequence import Item, Sequence, StepAhead

# Of a repeated step's rows; more where newcomers may join them soon (`apart`)
MAX_EMPTY_SHARE = {False: 1 / 16, True: 1 / 4}
MIN_NEWCOMER_SHARE = 1 / 16  # so many newcomers a row that decodes are admitted at once
MAX_STEPS_TO_WAIT = 8  # decode steps, for fewer newcomers than that


class Decision(Enum):
    """What the next step is."""

    REPLAN = "look at the draws first, and plan anew"
    REPEAT = "the same rows again, and those who join"
    BESIDE = "the same, and chunks beside them"
    CHUNKS_FIRST = "chunks alone: the rows only get ready, and wait"


class Candidates(NamedTuple):
    """Who could be in the next step.

    `rows` are those of the last one (None: empty), `decoding` the sequences in them. `joining`:
    those that the last step's chunks drew for, with the number of their draw. `prefilling` still
    have tokens to compute, from chunks that were cut. `newcomers`: how many of those who wait could
    be admitted.
    """

    rows: list[Sequence | None]
    decoding: list[Sequence]
    joining: list[tuple[int, Sequence]]
    prefilling: list[Sequence]
    newcomers: int


def plan_ahead(
    scheduler: Scheduler, rows: list[Sequence | None], drawn: list[Sequence | None], apart: bool
) -> StepAhead | None:
    """Book another decode step of the same rows before the last one was looked at; None, nothing
    booked, if it is time for a new plan. `drawn`: whom the last step's chunks drew for.
    """
    scheduler.steps_ahead += 1
    candidates = find_candidates(scheduler, rows, drawn)
    decision = decide(scheduler, candidates, apart)
    if decision is Decision.REPLAN:
        return None
    return book(scheduler, candidates, decision)


def find_candidates(
    scheduler: Scheduler, rows: list[Sequence | None], drawn: list[Sequence | None]
) -> Candidates:
    decoding = [s for s in rows if s is not None]
    joining = [(source, s) for source, s in enumerate(drawn) if s is not None]
    prefilling: list[Sequence] = []
    # Else all who run are in a row, or about to join
    if len(scheduler.running) > len(decoding) + len(joining):
        in_rows = {id(s) for s in decoding}
        prefilling = [s for s in scheduler.running if s.pending > 0 and id(s) not in in_rows]
    newcomers = 0
    if scheduler.may_admit:
        places = scheduler.max_num_seqs - len(scheduler.running)
        newcomers = min(len(scheduler.waiting), places)
    return Candidates(
        rows,
        decoding,
        joining=joining,
        prefilling=prefilling,
        newcomers=newcomers,
    )


def decide(scheduler: Scheduler, candidates: Candidates, apart: bool) -> Decision:
    """What the next step is. Changes nothing."""
    rows, decoding, joining, prefilling, newcomers = candidates
    active = decoding + [s for _, s in joining]
    # A recorded graph computes every row, used or not: once too many are empty, a new plan is cheaper.
    empty_rows = len(rows) - len(active)
    if not active or empty_rows > len(rows) * MAX_EMPTY_SHARE[apart]:
        return Decision.REPLAN
    # Prompts still being computed can only go on beside decoding where chunks have their own kernels.
    if prefilling and not apart:
        return Decision.REPLAN
    # To preempt someone for a page takes a plan that knows everyone's draws.
    if not _all_have_room(scheduler, candidates, active):
        return Decision.REPLAN

    waited_long = newcomers > 0 and scheduler.steps_ahead > MAX_STEPS_TO_WAIT
    if waited_long and not apart:
        return Decision.REPLAN
    many_newcomers = newcomers > len(active) * MIN_NEWCOMER_SHARE
    if apart and (prefilling or many_newcomers or waited_long):
        wait = _chunks_fill_a_step(scheduler, candidates)
        return Decision.CHUNKS_FIRST if wait else Decision.BESIDE
    # Every turn is as long as it may be: whatever was drawn, nobody goes on.
    if all(s.draws_last for s in active):
        return Decision.REPLAN
    return Decision.REPEAT


def _all_have_room(scheduler: Scheduler, candidates: Candidates, active: list[Sequence]) -> bool:
    """Whether all who decode may have a token more, and there are pages for everyone."""
    pool = scheduler.pool
    if max(s.computed for s in active) >= scheduler.max_length:
        return False
    if any(pool.missing(s.pages, s.computed, len(s.tokens)) for s in candidates.prefilling):
        return False
    # A sequence at the end of its last page needs another for its next token
    needed = sum(len(s.pages) * pool.page_size == s.computed for s in candidates.decoding)
    needed += sum(pool.missing(s.pages, s.computed, s.computed + 1) for _, s in candidates.joining)
    return needed <= len(pool.free)


def _chunks_fill_a_step(scheduler: Scheduler, candidates: Candidates) -> bool:
    """Whether what is to be computed for those who wait is as much as a step takes."""
    tokens = sum(s.pending for s in candidates.prefilling)
    led = set[int]()
    for s in scheduler.waiting[: candidates.newcomers]:
        if tokens >= scheduler.max_tokens:
            break
        group = s.group
        has_prompt = group is None or s.computed > 0 or bool(group.pages)
        # Of a group's samples without their prompt only one computes it
        leads = not scheduler.groups.must_wait(s) and id(group) not in led
        if has_prompt or leads:
            tokens += scheduler.groups.left(s)
            led.add(id(group))
    return tokens >= scheduler.max_tokens


def book(scheduler: Scheduler, candidates: Candidates, decision: Decision) -> StepAhead:
    """Take the pages of what was decided, and count its tokens as computed."""
    step = StepAhead(
        runs=decision is not Decision.CHUNKS_FIRST,
        rows=list(candidates.rows),
        added=[],
        joins=[],
        copies=[],
        chunks=[],
    )
    if step.runs:
        _advance_rows(scheduler, step)
    _seat(scheduler, step, candidates.joining)
    if step.runs:
        scheduler.stats.decode_tokens += sum(s is not None for s in step.rows)
    if decision is not Decision.REPEAT:
        _book_chunks(scheduler, step, candidates.prefilling)
    return step


def _advance_rows(scheduler: Scheduler, step: StepAhead) -> None:
    """A token more for everyone in a row, on a new page where the last one is full."""
    pool = scheduler.pool
    page_size = pool.page_size
    for slot, s in enumerate(step.rows):
        if s is None:
            continue
        if len(s.pages) * page_size == s.computed:
            pool.extend(s.pages, s.computed, s.computed + 1)
            step.added.append((slot, len(s.pages) - 1, s.pages[-1]))
        assert pool.counts[s.pages[-1]] == 1, "a row's last page is another's, too"
        s.computed += 1


def _seat(scheduler: Scheduler, step: StepAhead, joining: list[tuple[int, Sequence]]) -> None:
    """Give those whom the last chunks drew for a row, and room for their token."""
    for source, s in joining:
        copies = scheduler.pool.extend(s.pages, s.computed, s.computed + 1)
        assert copies is not None
        step.copies.extend(copies)
        step.join(s, source, s.computed)
        # Where the rows wait, it has its place and isn't computed yet
        s.computed += step.runs


def _book_chunks(scheduler: Scheduler, step: StepAhead, prefilling: list[Sequence]) -> None:
    """Go on with chunks that were cut, and admit who waits.

    Who has a single token left takes a row instead; where the rows wait, its token isn't counted.
    """
    items = list[Item]()
    budget = scheduler.max_tokens
    for s in sorted(prefilling, key=lambda s: s.number):
        # Without budget, one token at most: that is a row, which takes none
        count = min(s.pending, max(budget, 1))
        if count == s.pending or count > 1:
            items.append(Item(s, s.computed, count))
            budget -= count if count > 1 else 0
    scheduler.may_admit = scheduler.admit(items, step.copies, budget, apart=True)
    scheduler.steps_ahead = 0
    for item in items:
        if item.count > 1:
            step.chunks.append(item)
        else:
            step.join(item.sequence, None, item.start)
        if item.count > 1 or step.runs:
            scheduler.count(item)
