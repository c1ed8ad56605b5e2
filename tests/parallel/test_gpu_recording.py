"""A recording that an operation spoils leaves the GPU as it was: torch alone leaves it in the state
of recording.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from retool.parallel.capture import capture
from retool.parallel.fsdp import shard
from retool.parallel.fsdp.recording import ORDINARY_RUNS, Recordings
from retool.parallel.mesh import make_mesh
from tests.ranks import need_gpus, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


def is_free_again() -> bool:
    """Whether memory that a second stream has used can be used again: not while torch believes that
    a recording is under way.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    used = torch.ones(1 << 20, device="cuda")
    used.record_stream(torch.cuda.Stream())
    del used
    torch.cuda.synchronize()
    # The allocator looks at events when it is asked for memory
    torch.empty(1 << 20, device="cuda")
    return torch.cuda.memory_allocated() == before


@dataclass(frozen=True)
class Found:
    """What a process found: losses of work that waits for the device, warnings about it, whether all
    was as before it, and whether it is so after torch's own way to record.
    """

    losses: list[float]
    told: list[str]
    as_before: bool
    after_torch: bool


def spoilt() -> Found:
    module = torch.nn.Linear(64, 64, device="meta")
    model = shard(module, [("all", [module])], make_mesh(device="cuda"))
    model.master.fill_(0.5)
    model.refresh()
    x = torch.ones(4, 64, device="cuda", dtype=model.param_dtype)
    recordings = Recordings(model)
    before = torch.cuda.current_stream()

    def work() -> Tensor:
        loss = model(x).float().sum()
        loss.backward()
        loss.item()
        return loss.detach()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [float(recordings.run("one", work)) for _ in range(ORDINARY_RUNS + 3)]
    words = [str(warning.message) for warning in caught]
    torch.rand(4, device="cuda")
    # What doesn't wait can still be recorded
    graph = torch.cuda.CUDAGraph()
    with capture(graph, torch.cuda.graph_pool_handle()):
        doubled = x * 2
    graph.replay()
    as_before = is_free_again() and torch.cuda.current_stream() == before
    as_before = as_before and bool((doubled == 2).all())

    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    torch.cuda.set_stream(before)
    told = [word for word in words if "recorded" in word]
    return Found(losses, told, as_before, is_free_again())


def test_work_that_waits_for_the_device_goes_on_unrecorded() -> None:
    need_gpus(1)
    found = run_ranks(spoilt, 1, timeout=90)[0]
    assert len(set(found.losses)) == 1, found
    assert len(found.told) == 1 and "aren't recorded here" in found.told[0], found
    assert found.as_before, found
    assert not found.after_torch, "torch has mended it: retool.parallel.capture can go"
