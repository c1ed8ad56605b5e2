"""What every way of running a batch needs: arrays to the device, draws back to the host, and
recordings of steps that recur. And `run_once`, for a batch with shapes of its own.

`decode.py` repeats single tokens, `chunks.py` runs several tokens of a sequence in recorded shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retool.batch import to_device as tensor_to_device
from retool.engine.forward import Model, draw, hidden_states
from retool.engine.kernels.draws import Draws
from retool.engine.kernels.pages import Pages
from retool.engine.schedule.batch import Batch
from retool.parallel.capture import Pool, capture
from retool.parallel.streams import start_copy_to_host


@dataclass(frozen=True)
class Flight:
    """Draws [3, R] of a step that may still run, on the host and on the device."""

    values: Tensor
    arrived: torch.cuda.Event | None
    # A sequence can join the decode loop with a draw that the host hasn't seen
    on_device: Tensor

    def read(self) -> np.ndarray:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.numpy()


def send_draws(values: Tensor) -> Flight:
    """Start copying draws to the host."""
    if not values.is_cuda:
        # The next step writes where these draws are
        return Flight(values.clone(), None, values)
    host, arrived = start_copy_to_host(values)
    return Flight(host, arrived, values)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The host doesn't wait for it."""
    return tensor_to_device(torch.from_numpy(array), device)


def draw_rows(model: Model, x_tD: Tensor, batch: Batch) -> Flight:
    """Draw for the batch's rows from what the blocks made of its tokens."""
    if len(batch.rows) == 0:
        return send_draws(torch.empty(3, 0))
    device = x_tD.device
    rows = to_device(batch.rows, device)
    mine = None
    if model.group is not None:
        # Of the rows, those whose token lies in this rank's part of the sequence
        low = model.plan.rank * len(x_tD)
        places = np.flatnonzero((batch.rows >= low) & (batch.rows < low + len(x_tD)))
        mine = to_device(places, device), to_device(batch.rows[places] - low, device)
    return send_draws(draw(model, x_tD, rows, _draws_of(batch, device), batch.filtered, mine))


def _draws_of(batch: Batch, device: torch.device) -> Draws:
    return Draws(
        keys=to_device(batch.keys, device),
        # Where the token will be that is drawn: it names the random number, in whatever batch
        positions=to_device(batch.positions[batch.rows] + 1, device),
        temperature=to_device(batch.temperature, device),
        top_k=to_device(batch.top_k, device),
        top_p=to_device(batch.top_p, device),
    )


def run_once(model: Model, batch: Batch) -> Flight:
    """Any batch, with shapes of its own."""
    device = model.cache.data.device
    model.cache.copy(batch.copies)
    counts = batch.counts[batch.decode :]
    lengths = batch.lengths[batch.decode :]
    offsets = None
    key_offsets = None
    if len(counts):
        offsets = to_device(np.cumsum([0, *counts], dtype=np.int32), device)
        key_offsets = to_device(np.cumsum([0, *lengths], dtype=np.int32), device)
    alone = batch.each_alone and not len(counts)
    pages = Pages(
        slots=to_device(batch.slots, device),
        tables=to_device(batch.tables, device),
        lengths=to_device(batch.lengths, device),
        decode=batch.decode,
        offsets=offsets,
        key_offsets=key_offsets,
        counts=tuple(counts.tolist()),
        host_lengths=tuple((batch.lengths if alone else lengths).tolist()),
        each_alone=alone,
    )
    tokens = to_device(batch.tokens, device)
    positions = to_device(batch.positions, device)
    return draw_rows(model, hidden_states(model, tokens, positions, pages), batch)


class Recordings:
    """CUDA graphs of steps, each recorded when it is first run.

    A step reads and writes tensors that never move; other memory that it takes is `pool`, which all
    of them use in turn.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool: Pool | None = None

    def run(self, key: Hashable, step: Callable[[], None], state: Sequence[Tensor] = ()) -> None:
        """Replay what was recorded as `key`. `state`: tensors that the step changes."""
        if key not in self.graphs:
            self.graphs[key] = self._record(step, state)
        self.graphs[key].replay()

    def _record(self, step: Callable[[], None], state: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        """Recording wants the step run twice before, on a stream of its own. `state` is put back
        after each: a step further a sequence's keys would go where it may have no page.
        """
        before = [x.clone() for x in state]
        # The new stream is ordered after nothing: what was enqueued before must be over
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        with capture(graph, pool):
            step()
        # Only now: torch refuses a pool with memory in use whose only recording broke off
        self.pool = pool
        return graph
