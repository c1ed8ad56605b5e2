"""The scheduler alone, without a model: random schedules never leak, never stall, never compute a
token twice without need.
"""

from __future__ import annotations

import random

import pytest

from retool.engine.schedule import ahead as ahead_module
from retool.engine.schedule.ahead import plan_ahead
from retool.engine.schedule.batch import make_batch
from retool.engine.schedule.pages import PagePool
from retool.engine.schedule.scheduler import Scheduler
from retool.engine.schedule.sequence import Sequence, State, Step
from retool.engine.types import SamplingParams


class Written:
    """What each page's slots hold, as the device would have it: (token, its position, all tokens
    before it).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots = {}

    def apply(self, scheduler: Scheduler, step: Step, multiple: int, expand: bool) -> None:
        batch, _ = make_batch(step, self.size, multiple, all_rows=expand, expand=expand)
        old = dict(self.slots)
        for source, target in step.copies:
            for place in range(self.size):
                self.slots[target * self.size + place] = old.get(source * self.size + place)
        real = [
            (slot, token, position)
            for slot, token, position in zip(
                batch.slots, batch.tokens, batch.positions, strict=True
            )
            if slot >= self.size
        ]
        for item in step.items:
            for n in range(item.start, item.start + item.count):
                slot = item.sequence.pages[n // self.size] * self.size + n % self.size
                assert (slot, item.sequence.tokens[n], n) in real, (
                    "the batch computes other tokens than the step"
                )
                self.slots[slot] = tuple(item.sequence.tokens[: n + 1])
        assert len(real) == sum(i.count for i in step.items) and len(batch.tokens) % multiple == 0

    def check(self, scheduler: Scheduler) -> None:
        """Every live sequence finds its own tokens' KV in its pages."""
        for s in scheduler.sequences.values():
            for n in range(s.computed):
                assert self.slots[s.pages[n // self.size] * self.size + n % self.size] == tuple(
                    s.tokens[: n + 1]
                )


def pages_add_up(scheduler: Scheduler) -> None:
    pool = scheduler.pool
    counts = [0] * len(scheduler.pool.counts)
    for holder in (*scheduler.sequences.values(), *scheduler.groups.by_key.values()):
        for page in holder.pages:
            counts[page] += 1
    assert counts == pool.counts and counts[0] == 0
    assert sorted(pool.free) == [p for p in range(1, len(counts)) if counts[p] == 0]


def go_ahead(
    scheduler: Scheduler, rows: list[Sequence], written: Written, rng: random.Random
) -> list[Sequence]:
    """Repeat a decode step blindly some times; who then still expects a draw."""
    while rng.random() < 0.6:
        before = [(s.computed, list(s.pages)) for s in rows]
        step = plan_ahead(scheduler, [s if s.is_running else None for s in rows], [], apart=False)
        if step is None:
            assert before == [(s.computed, s.pages) for s in rows]
            break
        assert all(rows[row].pages[place] == page for row, place, page in step.added)
        for s, (computed, _) in zip(rows, before, strict=True):
            if s.computed > computed:  # booked; now the draw that it feeds comes in
                scheduler.accept(s, rng.randint(0, 9), -1.0, -1.0)
                place = s.computed - 1
                size = written.size
                written.slots[s.pages[place // size] * size + place % size] = tuple(
                    s.tokens[: s.computed]
                )
        pages_add_up(scheduler)
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_random_schedules(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    empty = rng.choice([1, 1 / 16])
    monkeypatch.setattr(ahead_module, "MAX_EMPTY_SHARE", {False: empty, True: empty})
    monkeypatch.setattr(ahead_module, "MIN_NEWCOMER_SHARE", empty)
    size = rng.choice([1, 2, 4, 8])
    pages = rng.randint(4, 24)
    most = rng.randint(1, 6)
    scheduler = Scheduler(
        PagePool(pages + 1, size), most, rng.randint(most, 20), rng.choice([1 << 60, 20])
    )
    limit = scheduler.max_length
    written = Written(size)
    expand = rng.random() < 0.3
    more: dict[object, int] = {}  # turns to come
    finished = started = 0
    for _ in range(4000):
        if started < 25 and rng.random() < 0.3:
            group = rng.choice([None, started // 4])
            prompt = (
                [group or 0] * rng.randint(1, min(limit + 2, 30))
                if group is None
                else [group] * (1 + group * 3 % (limit + 1))
            )
            scheduler.start(
                started, prompt, SamplingParams(max_tokens=rng.randint(1, 12), stop_ids=(7,)), group
            )
            more[started] = rng.randint(0, 2)
            started += 1
        step = scheduler.plan()
        if step is not None:
            assert (
                sum(i.count for i in step.items) <= scheduler.max_tokens
                and len(scheduler.running) <= most
            )
            written.apply(scheduler, step, rng.choice([1, 2, 3]), expand)
            rows = [i.sequence for i in step.items if i.draws]
            repeatable = all(i.count == 1 and i.draws for i in step.items)
            for s in go_ahead(scheduler, rows, written, rng) if repeatable else rows:
                if s.state is State.RUNNING:
                    scheduler.accept(s, rng.randint(0, 9), -1.0, -1.0)
        scheduler.refused.clear()
        pages_add_up(scheduler)
        written.check(scheduler)
        for s in [s for s in scheduler.sequences.values() if s.state is State.PARKED]:
            if rng.random() < 0.3:
                if more[s.key] > 0:
                    more[s.key] -= 1
                    scheduler.extend(
                        s.key,
                        [8] * rng.randint(0, 5),
                        SamplingParams(max_tokens=rng.randint(1, 9), stop_ids=(7,)),
                    )
                else:
                    scheduler.drop(s.key)
                    finished += 1
        if rng.random() < 0.01 and scheduler.sequences:
            scheduler.drop(rng.choice(list(scheduler.sequences)))
            finished += 1
        if started == 25 and finished == 25:
            break
    assert finished == 25, (
        f"stalled: {scheduler.stats}, waiting {len(scheduler.waiting)}, running {len(scheduler.running)}"
    )
    assert len(scheduler.pool.free) == pages and not scheduler.groups.by_key


def test_a_dropped_key_takes_its_refusal_along() -> None:
    """Else a sequence started under the same key would be told the capacity of the one before it."""
    scheduler = Scheduler(PagePool(3, 2), 4, 64, 1 << 60)
    scheduler.start("other", [1] * 9, SamplingParams(max_tokens=2), None)
    scheduler.start("key", [1] * 9, SamplingParams(max_tokens=2), None)
    scheduler.drop("key")
    scheduler.start("key", [1, 2], SamplingParams(max_tokens=2), None)
    assert [turn.key for turn in scheduler.refused] == ["other"]


def test_the_oldest_is_never_preempted() -> None:
    scheduler = Scheduler(PagePool(9, 2), 4, 64, 1 << 60)
    for key in range(4):
        scheduler.start(key, [1, 2], SamplingParams(max_tokens=12), None)
    order: list[int] = []
    for _ in range(200):
        step = scheduler.plan()
        if step is None:
            break
        assert step.items, "a step without work"
        for item in list(step.items):
            if item.draws:
                done = scheduler.accept(item.sequence, 3, 0.0, 0.0)
                if done is not None:
                    order.append(done.key)  # type: ignore[arg-type]
                    scheduler.drop(done.key)
    assert order == [0, 1, 2, 3] and scheduler.stats.preempted > 0


def draws_of(scheduler: Scheduler) -> list[object]:
    """Plan and accept: whose tokens were drawn."""
    step = scheduler.plan()
    assert step is not None
    drawn = [item.sequence for item in step.items if item.draws]
    for sequence in drawn:
        scheduler.accept(sequence, 3, -1.0, -1.0)
    return [sequence.key for sequence in drawn]


@pytest.mark.parametrize(("prompt", "drawn"), [(2, 3), (4, 1), (5, 0)])
def test_a_sequence_fills_all_the_room_there_is(prompt: int, drawn: int) -> None:
    """A last token is drawn from the one that fills it."""
    scheduler = Scheduler(PagePool(3, 2), 4, 64, 1 << 60)
    scheduler.start("a", [1] * prompt, SamplingParams(max_tokens=9), None)
    for _ in range(drawn):
        assert draws_of(scheduler) == ["a"]
    assert scheduler.plan() is None and scheduler.sequences["a"].state is State.PARKED
    assert len(scheduler.sequences["a"].logp) == drawn
    assert [turn.reason for turn in scheduler.refused] == ["capacity"] * (drawn == 0)


def test_a_leader_that_is_dropped_has_another_in_its_place() -> None:
    """In the middle of its group's prompt: else the others wait for it for ever."""
    scheduler = Scheduler(PagePool(9, 2), 4, 2, 1 << 60)
    for key in ("leader", "other"):
        scheduler.start(key, [1] * 6, SamplingParams(max_tokens=2), "group")
    assert draws_of(scheduler) == []
    scheduler.drop("leader")
    assert [draws_of(scheduler) for _ in range(3)] == [[], [], ["other"]]


def test_who_is_admitted_leaves_a_page_for_each_that_runs() -> None:
    """Else it would be computed, and have to give its place up at the next token of the older one."""
    scheduler = Scheduler(PagePool(4, 2), 4, 64, 1 << 60)
    scheduler.start("old", [1], SamplingParams(max_tokens=3), None)
    draws_of(scheduler)
    scheduler.start("new", [1] * 4, SamplingParams(max_tokens=2), None)
    assert draws_of(scheduler) == ["old"]
    scheduler.drop("old")
    assert draws_of(scheduler) == ["new"]
