"""Runs batches on the device, and brings what was drawn to the host.

[Note: running ahead] A decode step's state (tokens, positions, page tables, seeds) lies in tensors
that never move. The step ends by writing its draws back as the next step's tokens and adding one to
the positions. The next one can therefore start before the host has seen them, and is the same work
again: on a GPU a CUDA graph, recorded once per number of rows (`bucket`) and again with filtered
sampling. The host sends only what changes: pages that were added, rows that are over, and sequences
that join, which may bring draws of the last step's chunks that it hasn't seen either (`ahead.py`).
Draws are copied to pinned memory between two replays.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retool.engine.forward import Model, draw, hidden_states
from retool.engine.kernels.attention import Pages
from retool.engine.kernels.draws import Draws
from retool.engine.kernels.kv_cache import in_any_order
from retool.engine.schedule.batch import Batch, Change
from retool.parallel.fsdp.overlap import recorded


@dataclass(frozen=True)
class Flight:
    """Draws [3, R] of a step that may still run, on the host and on the device."""

    values: Tensor
    arrived: torch.cuda.Event | None
    on_device: Tensor

    def read(self) -> np.ndarray:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.numpy()


def launched(values: Tensor) -> Flight:
    """Start copying draws to the host."""
    if not values.is_cuda:
        return Flight(values.clone(), None, values)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return Flight(host, recorded(), values)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def draws_of(batch: Batch, device: torch.device) -> Draws:
    per_row = (
        batch.keys,
        batch.positions[batch.rows] + 1,
        batch.temperature,
        batch.top_k,
        batch.top_p,
    )
    return Draws(*(to_device(x, device) for x in per_row))


def drawn(model: Model, x_tD: Tensor, batch: Batch) -> Flight:
    """Draw for the batch's rows from what the blocks made of its tokens."""
    if len(batch.rows) == 0:
        return launched(torch.empty(3, 0))
    device = x_tD.device
    rows = to_device(batch.rows, device)
    mine = None
    if model.group is not None:
        low = model.plan.rank * len(x_tD)
        places = np.flatnonzero((batch.rows >= low) & (batch.rows < low + len(x_tD)))
        mine = to_device(places, device), to_device(batch.rows[places] - low, device)
    return launched(draw(model, x_tD, rows, draws_of(batch, device), batch.filtered, mine))


def run_once(model: Model, batch: Batch) -> Flight:
    """Any batch, with shapes of its own."""
    device = model.cache.data.device
    model.cache.copy(batch.copies)
    counts = batch.counts[batch.decode :]
    lengths = batch.lengths[batch.decode :]
    offsets = (
        [to_device(np.cumsum([0, *x], dtype=np.int32), device) for x in (counts, lengths)]
        if len(counts)
        else [None, None]
    )
    alone = batch.each_alone and not len(counts)
    pages = Pages(
        to_device(batch.slots, device),
        to_device(batch.tables, device),
        to_device(batch.lengths, device),
        batch.decode,
        *offsets,
        counts=tuple(counts.tolist()),
        host_lengths=tuple((batch.lengths if alone else lengths).tolist()),
        each_alone=alone,
    )
    x = hidden_states(
        model, to_device(batch.tokens, device), to_device(batch.positions, device), pages
    )
    return drawn(model, x, batch)


class Recordings:
    """CUDA graphs of steps, each recorded when it is first run. A step reads and writes tensors
    that never move; other memory that it takes is `pool`, which all of them use in turn.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None

    def run(self, key: Hashable, step: Callable[[], None], state: Sequence[Tensor] = ()) -> None:
        """Replay what was recorded as `key`. Recording wants the step run twice before, on a stream
        of its own; `state`, which it changes, is put back after each: a step further a sequence's
        keys would go where it may have no page.
        """
        if key not in self.graphs:
            before = [x.clone() for x in state]
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
                    for tensor, value in zip(state, before, strict=True):
                        tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog has a thread of its own
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step()
            self.pool = graph.pool()
            self.graphs[key] = graph
        self.graphs[key].replay()


class DecodeLoop:
    """One token for each of up to `most` sequences, again and again; see [Note: running ahead]."""

    def __init__(
        self, model: Model, most: int, width: int, recordings: Recordings | None, fixed: bool
    ) -> None:
        device = model.cache.data.device
        self.model = model
        self.recordings = recordings
        self.fixed = fixed
        self.most = most
        self.tokens, self.positions, self.keys, self.top_k = (
            torch.zeros(most, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.temperature, self.top_p = (
            torch.zeros(most, device=device),
            torch.ones(most, device=device),
        )
        self.tables = torch.zeros(most, width, dtype=torch.int32, device=device)
        # One of a row each
        self.values = (
            self.tokens,
            self.positions,
            self.keys,
            self.temperature,
            self.top_k,
            self.top_p,
        )
        dtype = torch.promote_types(model.cache.data.dtype, torch.float32)
        self.out = torch.zeros(3, most, dtype=dtype, device=device)
        self.rows = 0
        self.filtered = False

    def bucket(self, rows: int) -> int:
        """Rows of the recorded step that runs `rows` of them: powers of two up to 16, then
        multiples of 16, of 32 from 128 on.
        """
        if self.fixed:
            return self.most
        step = 1 << (rows - 1).bit_length() if rows <= 16 else 16 if rows <= 128 else 32
        ranks = self.model.plan.sp
        return min(self.most, -(-(-(-rows // step) * step) // ranks) * ranks)

    def start(self, batch: Batch) -> Flight:
        """Take over a batch of single tokens, all of them rows, and run it."""
        self.model.cache.copy(batch.copies)
        self.rows = self.bucket(len(batch.tokens))
        self.filtered = batch.filtered
        n = len(batch.tokens)
        device = self.tokens.device
        self._clear(slice(0, self.rows))
        sources = (
            batch.tokens,
            batch.positions,
            batch.keys,
            batch.temperature,
            batch.top_k,
            batch.top_p,
        )
        for target, source in zip(self.values, sources, strict=True):
            target[:n].copy_(to_device(source, device))
        self.tables[:n, : batch.tables.shape[1]].copy_(to_device(batch.tables, device))
        return self._run()

    def again(self, change: Change, drawn: Tensor | None) -> Flight | None:
        """The next token of the same sequences, and of those who join (not yet, where the change
        says so); `drawn` are the last chunks' draws. Rows that are over go on as padding: their
        pages may soon be another's.
        """
        self.model.cache.copy(change.copies)
        device = self.tables.device
        before = 0 if change.anew else self.rows
        self.rows = max(before, self.bucket(change.slots))
        self.filtered = change.filtered or (self.filtered and not change.anew)
        if self.rows > before:
            self._clear(slice(before, self.rows))
        if len(change.over):
            self._clear(to_device(change.over, device))
        if change.added.size:
            row, place, page = to_device(change.added, device)
            self.tables[row, place] = page.to(torch.int32)
        if change.joins.size:
            self._join(change, drawn)
        return self._run() if change.runs else None

    def _clear(self, rows: slice | Tensor) -> None:
        for state in (*self.values, self.tables):
            state[rows].zero_() if isinstance(rows, slice) else state.index_fill_(0, rows, 0)

    def _join(self, change: Change, drawn: Tensor | None) -> None:
        slots, sources, tokens, positions, keys, top_k = to_device(change.joins, self.tables.device)
        temperature, top_p = to_device(change.chances, self.tables.device)
        if drawn is not None and (change.joins[1] >= 0).any():
            tokens = torch.where(
                sources >= 0, drawn[0].index_select(0, sources.clamp(min=0)).long(), tokens
            )
        tables = to_device(change.tables, self.tables.device)
        targets = *self.values, self.tables[:, : tables.shape[1]]
        with in_any_order():
            for target, source in zip(
                targets, (tokens, positions, keys, temperature, top_k, top_p, tables), strict=True
            ):
                target.index_copy_(0, slots, source)

    def _run(self) -> Flight:
        rows = self.rows
        filtered = self.filtered
        if self.recordings is None:
            self._step(rows, filtered)
        else:
            self.recordings.run(
                ("decode", rows, filtered),
                lambda: self._step(rows, filtered),
                (self.tokens, self.positions),
            )
        return launched(self.out[:, :rows])

    def _step(self, rows: int, filtered: bool) -> None:
        size = self.model.cache.page_size
        width = self.tables.shape[1]
        positions = self.positions[:rows]
        tables = self.tables[:rows]
        place = (positions // size).clamp_(max=width - 1)
        slots = tables.gather(1, place[:, None])[:, 0].long() * size + positions % size
        lengths = (positions + 1).clamp_(max=width * size).to(torch.int32)
        pages = Pages(slots, tables, lengths, rows, each_alone=self.fixed)
        x = hidden_states(self.model, self.tokens[:rows], positions, pages)
        draws = Draws(
            self.keys[:rows],
            positions + 1,
            self.temperature[:rows],
            self.top_k[:rows],
            self.top_p[:rows],
        )
        everything = torch.arange(rows, device=positions.device)
        mine = None
        if self.model.group is not None:
            local = everything[: len(x)]
            mine = local + self.model.plan.rank * len(x), local
        out = draw(self.model, x, everything, draws, filtered, mine)
        self.out[:, :rows].copy_(out)
        self.tokens[:rows].copy_(out[0].long())
        self.positions[:rows].add_(1)
