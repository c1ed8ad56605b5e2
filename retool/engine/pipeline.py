"""One forward after the other. If it can, the next one starts before the last one's draws are read.

step()    no forward flies     plan one and start it (`_launch`)
          it can be repeated   start the next one (`_repeat`)
          then                 read the draws, and say which turns ended (`_accept`)
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from retool.engine.runner import Flight
from retool.engine.schedule.ahead import plan_ahead
from retool.engine.schedule.batch import make_batch, make_change
from retool.engine.schedule.scheduler import Scheduler
from retool.engine.schedule.sequence import RUNNING, Sequence, Step
from retool.engine.types import EngineOptions, TurnDone
from retool.engine.worker import Kind, Worker, round_up


class Part(NamedTuple):
    """One forward whose draws haven't been read yet.

    `rows`: whose draws they are; who ends meanwhile is taken out. `lengths`: how many tokens each
    had then. Without a `flight` the rows only wait for the next forward.
    """

    flight: Flight | None
    rows: list[Sequence | None]
    lengths: list[int]


class Flying(NamedTuple):
    """A step that was started: single tokens in the decode loop, and chunks beside them. One with
    `other` work can't be repeated.
    """

    loop: Part | None = None
    chunks: Part | None = None
    other: Part | None = None

    def parts(self) -> list[Part]:
        return [part for part in self if part is not None]


class Pipeline:
    """Plans with the scheduler, computes with the worker."""

    def __init__(self, scheduler: Scheduler, worker: Worker, options: EngineOptions) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self.options = options
        self._flying: Flying | None = None

    def step(self) -> list[TurnDone]:
        """One forward and the turns that ended with it."""
        scheduler = self.scheduler
        flying = self._flying or self._launch()
        done: list[TurnDone] = []
        self._flying = None
        if flying is not None:
            # The next forward starts here, before the draws of the last one are waited for below.
            self._flying = self._repeat(flying)
            for part in flying.parts():
                done += self._accept(part)
        done += scheduler.refused
        scheduler.refused = []
        return done

    def _launch(self) -> Flying | None:
        """Start the forward that the scheduler plans; None if there is nothing to compute."""
        worker = self.worker
        step = self.scheduler.plan()
        if step is None:
            return None
        self.scheduler.stats.steps += 1
        singles = [item for item in step.items if item.count == 1]
        chunks = [item for item in step.items if item.count > 1]
        # The loop goes on with what its rows drew: all of them must draw
        repeatable = all(item.draws for item in singles)

        if worker.chunks is not None and chunks:
            # Pages are copied before either runs
            beside = Step(chunks, [] if singles else step.copies)
            loop = self._start("start", Step(singles, step.copies)) if singles else None
            part = self._start("chunks", beside)
            return Flying(loop, part) if repeatable else Flying(None, part, loop)
        # No recorded steps, or several tokens of a sequence beside single ones: shapes of its own
        if worker.loop is None or (chunks and not self.options.deterministic):
            return Flying(other=self._start("once", step))
        part = self._start("start", step)
        return Flying(part) if repeatable and not chunks else Flying(other=part)

    def _start(self, kind: Kind, step: Step) -> Part:
        """Start a forward of planned work."""
        fixed = self.options.deterministic
        ranks = self.worker.model.plan.sp
        multiple = ranks
        if kind == "chunks":  # they are padded to a recorded shape later
            multiple = 1
        elif fixed:
            multiple = round_up(self.options.max_num_seqs, ranks)
        batch, rows = make_batch(
            step,
            self.worker.model.cache.page_size,
            multiple,
            all_rows=fixed or self.worker.loop is not None,
            expand=fixed,
        )
        flight = self.worker.run(kind, batch)
        return Part(flight, rows, [0 if row is None else len(row.tokens) for row in rows])

    def _repeat(self, flying: Flying) -> Flying | None:
        """Start the next decode step of the same sequences, and chunks beside it, if nothing else
        is to be done first.
        """
        in_loop = flying.loop.rows if flying.loop else []
        over = [n for n, row in enumerate(in_loop) if row is not None and row.state is not RUNNING]
        # Whoever isn't running any more is taken out now: it may run again before its draw, which was
        # in vain, is read
        for part in flying.parts():
            part.rows[:] = [s if s is not None and s.state is RUNNING else None for s in part.rows]
        # Its rows aren't in the loop's tensors: a new plan puts them there
        if flying.other is not None:
            return None

        rows = [*in_loop]
        # Nobody computes empty rows at the end
        while rows and rows[-1] is None:
            rows.pop()
        drawn = flying.chunks.rows if flying.chunks else []
        step = plan_ahead(self.scheduler, rows, drawn, apart=self.worker.chunks is not None)
        if step is None:
            return None
        self.scheduler.stats.steps += 1
        flight = self.worker.run("again", make_change(step, over, anew=flying.loop is None))
        loop = Part(flight, step.rows, [0 if row is None else row.computed for row in step.rows])
        chunks = self._start("chunks", Step(step.chunks, [])) if step.chunks else None
        return Flying(loop, chunks)

    def _accept(self, part: Part) -> list[TurnDone]:
        """Append what was drawn, and return the turns that this ends."""
        if part.flight is None:
            return []
        done = []
        accept = self.scheduler.accept
        ids, *logps = part.flight.read()
        draws = ids.astype(np.int64), *logps
        # A recorded step may have more rows. Of hundreds in each step, every look at one counts
        for row, length, token, logp, behaviour in zip(
            part.rows, part.lengths, *(values.tolist() for values in draws), strict=False
        ):
            # Whose tokens are other ones by now was drawn for in vain
            if row is not None and row.state is RUNNING and len(row.tokens) == length:
                turn = accept(row, token, logp, behaviour)
                if turn is not None:
                    done.append(self._with_experts(turn, row))
        return done

    def _with_experts(self, turn: TurnDone, sequence: Sequence) -> TurnDone:
        """The turn, and who computed its tokens where that is asked for."""
        experts = self.worker.model.experts
        if experts is None:
            return turn
        # The last token was only drawn
        stop = len(sequence.tokens) - 1
        found = experts.read(sequence.pages, sequence.told, stop)
        sequence.told = stop
        return replace(turn, experts=found)
