"""Recording a CUDA graph so that whatever breaks it off leaves nothing in the state of recording.

[Note: a recording that can't be ended] An operation that waits for the device, such as `item()`,
spoils a recording: `cudaStreamEndCapture` fails, and `CUDAGraph::capture_end` does nothing after that.
The thread stays on the stream that it recorded on. The allocator takes the recording for one under way:
memory that a second stream has used isn't free again, and no other recording can use the pool. Both
allocators keep a pointer to the graph. In some releases of torch the generators refuse to draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from retool.parallel.streams import OnStream, current_stream

Pool = Any  # what `torch.cuda.graph_pool_handle()` gives, a type of torch's own

# Graphs that torch's allocators still point to, see the note
BROKEN: list[torch.cuda.CUDAGraph] = []


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Pool) -> Iterator[None]:
    """What is enqueued inside becomes the graph, with memory of `pool`.

    What is raised inside, or at the end, goes through. Then ordinary work goes on as before.
    """
    try:
        # NCCL's watchdog and autograd have threads of their own
        with (
            OnStream(current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            yield
    except BaseException:
        _give_up(graph, pool)
        raise


def _give_up(graph: torch.cuda.CUDAGraph, pool: Pool) -> None:
    """See [Note: a recording that can't be ended]."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except (AttributeError, RuntimeError):
        pass  # torch did it, and the graph gives its part of the pool back itself
    else:
        torch._C._cuda_releasePool(device, pool)
    graph.reset()
    BROKEN.append(graph)
    # A recording that ends well takes the generators out of that state, too
    another = torch.cuda.CUDAGraph()
    try:
        with (
            OnStream(current_stream()),
            torch.cuda.graph(another, capture_error_mode="thread_local"),
        ):
            torch.zeros(1, device=torch.device("cuda", device))
    except RuntimeError:  # such as a device that does nothing any more
        BROKEN.append(another)
