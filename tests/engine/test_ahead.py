"""What becomes of the next decode step: each decision where it is due, and none of them books a
thing.
"""

from __future__ import annotations

import copy

import pytest

from retool.engine.schedule.ahead import Candidates, Decision, book, decide, find_candidates
from retool.engine.schedule.pages import PagePool
from retool.engine.schedule.scheduler import Scheduler
from retool.engine.schedule.sequence import Sequence
from retool.engine.types import SamplingParams


def decoding(
    count: int, max_tokens: int = 9, pages: int = 200, most: int = 40
) -> tuple[Scheduler, list[Sequence | None]]:
    """A scheduler whose `count` sequences were computed and drew nothing yet, and their rows."""
    scheduler = Scheduler(PagePool(pages + 1, 4), most, 64, 1 << 60)
    for key in range(count):
        scheduler.start(key, [1, 2, 3], SamplingParams(max_tokens=max_tokens), None)
    while step := scheduler.plan():
        if all(item.sequence.pending == 0 for item in step.items) and not scheduler.waiting:
            break
    return scheduler, list(scheduler.running)


def decision(
    scheduler: Scheduler, rows: list[Sequence | None], apart: bool
) -> tuple[Decision, Candidates]:
    before = copy.deepcopy((scheduler.pool, scheduler.stats, scheduler.steps_ahead))
    candidates = find_candidates(scheduler, rows, [])
    found = decide(scheduler, candidates, apart)
    after = scheduler.pool, scheduler.stats, scheduler.steps_ahead
    assert [vars(x) if hasattr(x, "__dict__") else x for x in before] == [
        vars(x) if hasattr(x, "__dict__") else x for x in after
    ]
    return found, candidates


@pytest.mark.parametrize("apart", [False, True])
def test_the_same_rows_go_on(apart: bool) -> None:
    scheduler, rows = decoding(16)
    found, candidates = decision(scheduler, rows, apart)
    assert found is Decision.REPEAT
    computed = [s.computed for s in scheduler.running]
    step = book(scheduler, candidates, found)
    assert (
        step.runs
        and [s.computed - n for s, n in zip(scheduler.running, computed, strict=True)] == [1] * 16
    )


@pytest.mark.parametrize(("apart", "most"), [(False, 1), (True, 4)])
def test_too_many_empty_rows_want_a_new_plan(apart: bool, most: int) -> None:
    """One in sixteen, or one in four where others may join."""
    scheduler, rows = decoding(16)
    for empty in range(17):
        found, _ = decision(scheduler, [None] * empty + rows[empty:], apart)
        assert found is (Decision.REPEAT if empty <= most else Decision.REPLAN), empty


def test_turns_that_are_as_long_as_they_may_be_want_a_new_plan() -> None:
    scheduler, rows = decoding(4, max_tokens=1)
    assert decision(scheduler, rows, True)[0] is Decision.REPLAN


def test_a_missing_page_wants_a_new_plan() -> None:
    scheduler, rows = decoding(4, pages=7)
    assert len(rows) == 4 and len(scheduler.pool.free) == 3
    assert decision(scheduler, rows, True)[0] is Decision.REPEAT  # the fourth token has room
    book(scheduler, find_candidates(scheduler, rows, []), Decision.REPEAT)
    assert decision(scheduler, rows, True)[0] is Decision.REPLAN


def test_newcomers_wait_until_they_are_many_or_waited_long() -> None:
    scheduler, rows = decoding(32)
    params = SamplingParams(max_tokens=9)
    for key in ("first", "second"):
        scheduler.start(key, [1, 2, 3], params, None)
    scheduler.steps_ahead = 8
    assert decision(scheduler, rows, True)[0] is Decision.REPEAT
    assert decision(scheduler, rows, False)[0] is Decision.REPEAT
    scheduler.steps_ahead = 9
    assert decision(scheduler, rows, True)[0] is Decision.BESIDE
    assert decision(scheduler, rows, False)[0] is Decision.REPLAN
    scheduler.steps_ahead = 1
    scheduler.start("third", [1, 2, 3], params, None)
    assert decision(scheduler, rows, True)[0] is Decision.BESIDE
    assert decision(scheduler, rows, False)[0] is Decision.REPEAT


def test_rows_wait_for_chunks_that_fill_a_step() -> None:
    scheduler, rows = decoding(8)
    for key in ("first", "second"):
        scheduler.start(key, [1] * 40, SamplingParams(max_tokens=9), None)
    found, candidates = decision(scheduler, rows, True)
    assert found is Decision.CHUNKS_FIRST
    computed = [s.computed for s in rows if s is not None]
    step = book(scheduler, candidates, found)
    assert not step.runs and [item.count for item in step.chunks] == [40, 24]
    assert [s.computed for s in rows if s is not None] == computed
