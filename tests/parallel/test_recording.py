"""Recordings that break off, on the streams that are there without a GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from retool.optim import AdamW, AdamWOptions
from retool.parallel import capture
from retool.parallel.fsdp import Sharded, shard
from retool.parallel.fsdp.recording import ORDINARY_RUNS, Recordings, Work
from retool.parallel.mesh import make_mesh
from retool.parallel.streams import OnStream
from tests.parallel.streams import Stream, Streams, watched
from tests.ranks import run_ranks


class Capture:
    """`torch.cuda.graph`: an end that fails doesn't give the thread its stream back, nor tell the
    allocator.
    """

    stream = Stream()
    others: tuple[Any, ...] = ()
    failing = False  # an operation that can't be recorded spoils the end, too

    def __init__(self, *_: object, pool: tuple[int, int] = (1, 0), **__: object) -> None:
        self.before = Streams.now
        self.pool = pool

    def __enter__(self) -> None:
        Capture.stream.wait_stream(self.before)
        Streams.now = Capture.stream
        Allocator.pools[self.pool] += 1

    def __exit__(self, *_: object) -> None:
        # A recording runs nothing, so nothing need wait for it
        self.before.wait_stream(Capture.stream)
        known = Capture.stream.clock
        left = [x for x in Capture.others if known.get(x.number, 0) < x.clock[x.number]]
        spoilt = Capture.failing
        Capture.failing = False
        if left or spoilt:
            raise RuntimeError("the end of a recording: streams that aren't joined, or worse")
        Allocator.pools[self.pool] -= 1
        Streams.now = self.before


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.is_reset = False

    def replay(self) -> None:
        """What was recorded, which was nothing."""

    def reset(self) -> None:
        self.is_reset = True


class Allocator:
    """How often torch's allocator was told that a recording begins, and that it ends."""

    pools: ClassVar[Counter[tuple[int, int]]] = Counter()
    released = 0

    @staticmethod
    def end(_: int, pool: tuple[int, int]) -> None:
        if not Allocator.pools[pool]:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        Allocator.pools[pool] -= 1

    @staticmethod
    def release(_: int, pool: tuple[int, int]) -> None:
        Allocator.released += 1


def one_process(patch: pytest.MonkeyPatch) -> Sharded:
    patch.setattr(torch.cuda, "graph", Capture)
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch._C, "_cuda_endAllocateToPool", Allocator.end, raising=False)
    patch.setattr(torch._C, "_cuda_releasePool", Allocator.release, raising=False)
    patch.setattr(Allocator, "pools", Counter())
    patch.setattr(Allocator, "released", 0)
    patch.setattr(capture, "BROKEN", [])
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    module = torch.nn.Linear(2, 2)
    model = shard(module, [("all", [module])], make_mesh())
    Capture.others = (model.overlap.gather_stream, model.overlap.reduce_stream)
    return model


@pytest.mark.parametrize("failing", [False, True])
def test_a_recording_that_breaks_off_leaves_nothing_behind(
    failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched():
        model = one_process(monkeypatch)
        recordings = Recordings(model)
        x = torch.ones(1, 2, dtype=model.param_dtype)
        before = Streams.now

        def work() -> Tensor:
            loss = model(x).sum()
            loss.backward()
            return loss.detach()

        def broken() -> Tensor:
            for stream in Capture.others:
                with OnStream(stream):
                    torch.zeros(1)
            if Streams.now is Capture.stream:
                Capture.failing = failing
                raise RuntimeError("out of memory")
            return work()

        for _ in range(ORDINARY_RUNS + 1):
            recordings.run("one", work)
        assert recordings.made
        for _ in range(ORDINARY_RUNS):
            recordings.run("another", broken)
        with pytest.warns(UserWarning, match=r"aren't recorded here.*: out of memory$"):
            recordings.run("another", broken)
        assert Streams.now is before, "the thread's stream"
        assert not recordings.made, "memory that nothing uses any more"
        assert not +Allocator.pools, "no recording is under way"
        assert Allocator.released == failing, "the pool's share of the one that wasn't ended"
        graph: Any = capture.BROKEN[0]
        assert graph.is_reset
        # And the run goes on
        recordings.run("one", work)
        AdamW(model, AdamWOptions()).step(1e-3)


def test_graphs_of_a_device_that_is_gone_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocators point to them, and ask them whenever memory is free again."""

    class Gone(Capture):
        def __enter__(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    with watched():
        one_process(monkeypatch)
        monkeypatch.setattr(torch.cuda, "graph", Gone)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="illegal"), capture.capture(graph, (0, 7)):
            pass
        assert len(capture.BROKEN) == 2 and capture.BROKEN[0] is graph


def record_on_the_first_rank(work: Work, model: Sharded) -> Work:
    if model.mesh.rank:
        raise RuntimeError("out of memory")
    return work


def recorded_on_one_rank() -> tuple[int, list[str]]:
    """How many recordings there are, and the warnings."""
    module = torch.nn.Linear(2, 2)
    model = shard(module, [("all", [module])], make_mesh())
    recordings = Recordings(model, record_on_the_first_rank)

    def work() -> Tensor:
        loss = model(torch.ones(1, 2, dtype=model.param_dtype)).sum()
        loss.backward()
        return loss.detach()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(ORDINARY_RUNS + 2):
            recordings.run("one", work)
    return len(recordings.made), [str(warning.message) for warning in caught]


def test_where_one_rank_cannot_record_none_does() -> None:
    """NCCL wants a collective recorded on all ranks or on none."""
    for made, told in run_ranks(recorded_on_one_rank, 2):
        assert made == 0
        assert [text.partition(": ")[2] for text in told] == ["rank 1: RuntimeError: out of memory"]
