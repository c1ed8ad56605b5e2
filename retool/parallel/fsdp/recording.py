"""A forward and a backward of a sharded module, recorded once and replayed with one launch.

[Note: one launch for a micro-batch] A layer is some sixty launches, forward, backward and collectives
together. With few tokens the device waits for them. A CUDA graph has all of them in one. Little stands
in its way here: a unit never leaves its buffer, gradients are added into one shard, and no step of a
forward or backward waits for the device. Two things have to be kept:
  * what a recording reads lies in tensors that never move, and the same Python would run again: the
    caller's key says so;
  * an event of a recording means nothing outside it, nor one of outside in it. So the module is at
    rest at both ends: nothing is under way, and no buffer holds a unit.
A recording's collectives meet recorded ones: all ranks must give the same keys in the same order, and
where one of them can't record, none does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from retool.parallel.agreement import GivenUp, all_or_none
from retool.parallel.capture import Pool, capture
from retool.parallel.fsdp.sharded import Sharded
from retool.parallel.streams import OnStream, current_stream

Work = Callable[[], torch.Tensor]  # a forward and its backward; gives the loss, without a history
# Makes of work what does it again, and gives the result's memory
Record = Callable[[Work, Sharded], Work]

# Runs before a recording: kernels are compiled, plans and communicators made in the first
ORDINARY_RUNS = 2


@dataclass(frozen=True)
class Recording:
    """`holds`: whether each unit has held gradients afterwards, see `Gradients.holds`."""

    replay: Work
    holds: list[bool]


class Recordings:
    """What was recorded of one module, by key. See [Note: one launch for a micro-batch]."""

    def __init__(self, model: Sharded, record: Record | None = None) -> None:
        self.model = model
        self.record = Graphs().record if record is None else record
        self.made: dict[Hashable, Recording] = {}
        self.runs = Counter[Hashable]()
        self.fails = False

    def run(self, key: Hashable, work: Work) -> torch.Tensor:
        """Do the work: as it is at first, then recorded. The result is good until the key's next run."""
        units = self.model.units
        # What is held is added to, what isn't is written
        key = (key, any(unit.gradients.holds for unit in units))
        self.runs[key] += 1
        if self.fails or self.runs[key] <= ORDINARY_RUNS:
            return work()
        come_to_rest(self.model)
        if key not in self.made and not self._make(key, work):
            return work()
        recording = self.made[key]
        result = recording.replay()
        _set_holds(self.model, recording.holds)
        self.model.overlap.follow_new_weights()
        return result

    def _make(self, key: Hashable, work: Work) -> bool:
        """Record the work, of which nothing is computed yet. Where that can't be done on some rank, a
        warning says so, and from then on all work is done as it is, on all of them. Collective.
        """
        units = self.model.units
        mesh = self.model.mesh
        before = [unit.gradients.holds for unit in units]
        try:
            replay = all_or_none(mesh.rank, mesh.world_group, lambda: self._record(work))
        except GivenUp as failed:
            self.fails = True
            # Memory may be what was missing
            self.made.clear()
            forget_unfinished(self.model)
            words = "small micro-batches aren't recorded here, and take the host longer"
            warnings.warn(f"{words}: {failed}", stacklevel=2)
        else:
            self.made[key] = Recording(replay, [unit.gradients.holds for unit in units])
        _set_holds(self.model, before)
        return not self.fails

    def _record(self, work: Work) -> Work:
        try:
            return self.record(work, self.model)
        except Exception as error:  # whatever a library raises that can't be recorded
            raise _first(error) from None


def _first(error: BaseException) -> BaseException:
    """What came first: a recording that was broken off can't be ended either, which is an error, too."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return error


def _set_holds(model: Sharded, holds: list[bool]) -> None:
    for unit, held in zip(model.units, holds, strict=True):
        unit.gradients.holds = held


def come_to_rest(model: Sharded) -> None:
    """What follows comes after all that is under way, and gathers anew."""
    held = [unit.gradients.held for unit in model.units]
    for buffer in (*model.buffers, *model.grad_buffers, *held):
        if buffer is not None:
            buffer.settle()
            buffer.free = None
            buffer.holder = None
    for unit in model.units:
        unit.gradients.wait()
        unit.gradients.sending = None


def forget_unfinished(model: Sharded) -> None:
    """As if a forward or backward that failed had not begun, and nothing were under way."""
    held = [unit.gradients.held for unit in model.units]
    for buffer in (*model.buffers, *model.grad_buffers, *held):
        if buffer is not None:
            buffer.pending = None
            buffer.in_use = None
    for unit in model.units:
        unit.gradients.adding = None
        unit.give_up()
        for parameter in unit.parameters:
            parameter.grad = None
    come_to_rest(model)
    model.overlap.follow_new_weights()


class Graphs:
    """CUDA graphs. What one of them needs while it runs is taken from `pool`, by all in turn."""

    def __init__(self) -> None:
        self.pool: Pool | None = None

    def record(self, work: Work, model: Sharded) -> Work:
        graph = torch.cuda.CUDAGraph()
        overlap = model.overlap
        pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        with capture(graph, pool):
            overlap.follow_new_weights()
            try:
                result = work()
                come_to_rest(model)
            finally:
                # Also where an error ends it: streams that haven't come back can't be ended
                for stream in (overlap.gather_stream, overlap.reduce_stream):
                    come_back(stream)
        # Only now: torch refuses a pool with memory in use whose only recording broke off
        self.pool = pool

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


def come_back(stream: torch.cuda.Stream | None) -> None:
    """What follows comes after what is recorded on another stream, if anything is."""
    if stream is None:
        return
    with OnStream(stream):
        recorded = torch.cuda.is_current_stream_capturing()
    if recorded:
        current_stream().wait_stream(stream)
