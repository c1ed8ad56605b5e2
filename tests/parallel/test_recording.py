"""Recordings that break off, on the streams that are there without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import Sharded, shard
from retool.parallel.fsdp.recording import ORDINARY_RUNS, Recordings
from retool.parallel.mesh import make_mesh
from retool.parallel.streams import OnStream
from tests.parallel.streams import Stream, Streams, watched


class Capture:
    """`torch.cuda.graph`: an end that fails doesn't give the thread its stream back."""

    stream = Stream()
    others: tuple[Any, ...] = ()
    failing = False  # an operation that can't be recorded spoils the end, too

    def __init__(self, *_: object, **__: object) -> None:
        self.before = Streams.now

    def __enter__(self) -> None:
        Capture.stream.wait_stream(self.before)
        Streams.now = Capture.stream

    def __exit__(self, *_: object) -> None:
        # A recording runs nothing, so nothing need wait for it
        self.before.wait_stream(Capture.stream)
        known = Capture.stream.clock
        left = [x for x in Capture.others if known.get(x.number, 0) < x.clock[x.number]]
        if left or Capture.failing:
            raise RuntimeError("the end of a recording: streams that aren't joined, or worse")
        Streams.now = self.before


def one_process(patch: pytest.MonkeyPatch) -> Sharded:
    graph = SimpleNamespace(pool=lambda: None, replay=lambda: None)
    patch.setattr(torch.cuda, "graph", Capture)
    patch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
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
        monkeypatch.setattr(Capture, "failing", False)
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
                raise RuntimeError("out of memory")
            return work()

        for _ in range(ORDINARY_RUNS + 1):
            recordings.run("one", work)
        assert recordings.made
        monkeypatch.setattr(Capture, "failing", failing)
        for _ in range(ORDINARY_RUNS):
            recordings.run("another", broken)
        with pytest.warns(UserWarning, match=r"aren't recorded here.*: out of memory$"):
            recordings.run("another", broken)
        assert Streams.now is before, "the thread's stream"
        assert not recordings.made, "memory that nothing uses any more"
        # And the run goes on
        recordings.run("one", work)
        AdamW(model, AdamWOptions()).step(1e-3)
