"""A recording that an operation spoils leaves the GPU as it was: torch alone leaves it in the state
of recording.
"""

from __future__ import annotations

import warnings

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


def spoilt() -> tuple[list[float], list[str], bool]:
    """The losses of work that waits for the device, what was warned of, and whether all is as before."""
    mesh = make_mesh(device="cuda")
    module = torch.nn.Linear(64, 64)
    model = shard(module, [("all", [module])], mesh)
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

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        losses = [float(recordings.run("one", work)) for _ in range(ORDINARY_RUNS + 3)]
    torch.rand(4, device="cuda")
    torch.cuda.get_rng_state()
    # What doesn't wait can still be recorded
    graph = torch.cuda.CUDAGraph()
    with capture(graph, torch.cuda.graph_pool_handle()):
        doubled = x * 2
    graph.replay()
    as_before = is_free_again() and torch.cuda.current_stream() == before
    as_before = as_before and bool((doubled == 2).all())
    words = [str(warning.message) for warning in told]
    return losses, [word for word in words if "recorded" in word], as_before


def test_work_that_waits_for_the_device_goes_on_unrecorded() -> None:
    need_gpus(1)
    losses, told, as_before = run_ranks(spoilt, 1, timeout=90)[0]
    assert len(set(losses)) == 1, losses
    assert len(told) == 1 and "aren't recorded here" in told[0], told
    assert as_before


def test_torch_alone_would_leave_it_recording() -> None:
    """Where this fails, torch has mended it, and `capture` can go."""
    need_gpus(1)
    assert not run_ranks(left_by_torch, 1, timeout=90)[0]


def left_by_torch() -> bool:
    torch.cuda.set_device(0)
    x = torch.ones(4, device="cuda")
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        (x * 2).sum().item()
    torch.cuda.set_stream(before)
    return is_free_again()
