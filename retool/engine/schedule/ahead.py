"""The step after one that decodes, planned before that one's draws were seen: who goes on, who
joins, and what is computed beside it.

A decode step can be repeated before the host has seen its draws. A row whose turn turns out to be
over is then computed in vain, which is cheaper than stopping the device for every end. Where chunks
are computed apart from single tokens (`apart`), newcomers are computed beside such a step and join
the rows of the next one, with draws that the host hasn't seen either; they are admitted several at
a time, or after `PATIENCE` steps. While there is more to compute for them than a step takes, the
rows that decode wait: they would only make the last of all come later. Otherwise newcomers wait
`PATIENCE` steps for a new plan. One is made, too, when more than one row in `TOLERATED` (`SPARSE`
where others may join) is over, when a page is missing, or when every turn is as long as it may be.
"""

from __future__ import annotations

from retool.engine.schedule.pages import PagePool
from retool.engine.schedule.scheduler import Scheduler
from retool.engine.schedule.sequence import Ahead, Item, Sequence

TOLERATED = 16
SPARSE = 4
PATIENCE = 8


def plan_ahead(
    scheduler: Scheduler, rows: list[Sequence | None], drawn: list[Sequence | None], apart: bool
) -> Ahead | None:
    """Book another decode step of the same rows before the last one was looked at; None, nothing
    changed, if it is time for a new plan. `drawn`: whom the last step's chunks drew for.
    """
    pool = scheduler.pool
    fresh = [(source, s) for source, s in enumerate(drawn) if s is not None]
    going = [s for s in rows if s is not None]
    live = going + [s for _, s in fresh]
    here = {id(s) for s in going}
    late = [s for s in scheduler.running if s.pending > 0 and id(s) not in here]
    scheduler.steps_ahead += 1
    if (
        not live
        or len(rows) - len(live) > len(rows) // (SPARSE if apart else TOLERATED)
        or (late and not apart)
    ):
        return None
    if any(s.computed >= scheduler.max_length for s in live) or any(
        pool.missing(s.pages, s.computed, len(s.tokens)) for s in late
    ):
        return None
    needed = sum(_at_an_edge(pool, s) for s in going) + sum(
        pool.missing(s.pages, s.computed, s.computed + 1) for _, s in fresh
    )
    if needed > len(pool.free):
        return None
    ready = (
        min(len(scheduler.waiting), scheduler.max_num_seqs - len(scheduler.running))
        if scheduler.changed
        else 0
    )
    if ready > 0 and not apart and scheduler.steps_ahead > PATIENCE:
        return None
    beside = apart and (
        bool(late)
        or ready * TOLERATED > len(live)
        or (ready > 0 and scheduler.steps_ahead > PATIENCE)
    )
    if not beside and all(s.ends for s in live):
        return None
    step = Ahead(not (beside and _is_much(scheduler, late, ready)), list(rows), [], [], [], [])
    _advance(scheduler, step, fresh)
    if beside:
        _beside(scheduler, step, late)
    return step


def _is_much(scheduler: Scheduler, late: list[Sequence], ready: int) -> bool:
    """Whether what is to be computed for those who wait fills a step."""
    tokens = sum(s.pending for s in late)
    led = set[int]()
    for s in scheduler.waiting[:ready]:
        if tokens >= scheduler.max_tokens:
            break
        alone = s.group is None or s.computed > 0 or bool(s.group.pages)
        # Of samples without their prompt one computes it
        if alone or (not scheduler.groups.must_wait(s) and id(s.group) not in led):
            tokens += scheduler.groups.left(s)
            led.add(id(s.group))
    return tokens >= scheduler.max_tokens


def _advance(scheduler: Scheduler, step: Ahead, fresh: list[tuple[int, Sequence]]) -> None:
    """Book a token more of everyone if the step runs, and give those who are new among the rows a
    place.
    """
    for slot, s in enumerate(step.rows):
        if s is not None and step.runs:
            if _at_an_edge(scheduler.pool, s):
                scheduler.pool.extend(s.pages, s.computed, s.computed + 1)
                step.added.append((slot, len(s.pages) - 1, s.pages[-1]))
            assert scheduler.pool.counts[s.pages[-1]] == 1, "a row's last page is another's, too"
            s.computed += 1
    for source, s in fresh:
        copies = scheduler.pool.extend(s.pages, s.computed, s.computed + 1)
        assert copies is not None
        step.copies.extend(copies)
        step.join(s, source, s.computed)
        s.computed += step.runs
    scheduler.stats.decode_tokens += sum(s is not None for s in step.rows) * step.runs


def _at_an_edge(pool: PagePool, s: Sequence) -> bool:
    """Whether a sequence that decodes needs another page for its next token."""
    return len(s.pages) * pool.page_size == s.computed


def _beside(scheduler: Scheduler, step: Ahead, late: list[Sequence]) -> None:
    """Go on with chunks that were cut, and admit who waits."""
    items = list[Item]()
    budget = scheduler.max_tokens
    for s in sorted(late, key=lambda s: s.number):
        count = min(s.pending, max(budget, 1))
        if count > 1 or count == s.pending:
            items.append(Item(s, s.computed, count))
            budget -= count if count > 1 else 0
    scheduler.changed = scheduler.admit(items, step.copies, budget, apart=True)
    scheduler.steps_ahead = 0
    for item in items:
        if item.count > 1:
            step.chunks.append(item)
        else:
            step.join(item.sequence, None, item.start)
        if item.count > 1 or step.runs:
            scheduler.count(item)
