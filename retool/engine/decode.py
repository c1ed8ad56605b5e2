"""The decode loop: one token for each of many sequences, again and again.

[Note: running ahead] A decode step's state (tokens, positions, page tables, seeds) lies in tensors
that never move. The step ends by writing its draws back as the next step's tokens and adding one to
the positions. So the next one is the same work again, and can start before the host has seen the
draws. On a GPU it is a CUDA graph, recorded once per number of rows (`bucket`), and again with
filtered sampling. The host sends only what changes: pages that were added, rows that are over, and
sequences that join, which may bring draws of the last step's chunks that it hasn't seen either
(`schedule/ahead.py`). Draws are copied to pinned memory between two replays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retool.engine.forward import Model, draw, hidden_states, scored
from retool.engine.kernels.draws import Draws
from retool.engine.kernels.kv_cache import in_any_order, located
from retool.engine.kernels.pages import Pages
from retool.engine.runner import Flight, Recordings, send_draws, to_device
from retool.engine.schedule.batch import Batch, Change


class DecodeLoop:
    """Runs up to `most` rows; with `fixed`, always so many. See [Note: running ahead]."""

    def __init__(
        self, model: Model, most: int, width: int, recordings: Recordings | None, fixed: bool
    ) -> None:
        """`width`: pages of the longest sequence."""
        device = model.cache.data.device
        self.model = model
        self.recordings = recordings
        self.fixed = fixed
        self.most = most
        # Made once: a recorded step reads and writes these very addresses
        self.tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self.positions = torch.zeros(most, dtype=torch.int64, device=device)
        self.keys = torch.zeros(most, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(most, device=device)
        self.top_k = torch.zeros(most, dtype=torch.int64, device=device)
        self.top_p = torch.ones(most, device=device)
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
        if rows <= 16:
            multiple = 1 << (rows - 1).bit_length()
        else:
            multiple = 16 if rows <= 128 else 32
        # The ranks of a group compute equally many rows
        ranks = self.model.plan.sp
        padded = -(-rows // multiple) * multiple
        return min(self.most, -(-padded // ranks) * ranks)

    def start(self, batch: Batch) -> Flight:
        """Take over a batch of single tokens, all of them rows, and run it."""
        self.model.cache.copy(batch.copies)
        count = len(batch.tokens)
        device = self.tokens.device
        self.rows = self.bucket(count)
        self.filtered = batch.filtered
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
            target[:count].copy_(to_device(source, device))
        self.tables[:count, : batch.tables.shape[1]].copy_(to_device(batch.tables, device))
        return self._run()

    def again(self, change: Change, drawn: Tensor | None) -> Flight | None:
        """The next token of the same sequences, and of those who join (not yet, where the change
        says so); `drawn` are the last chunks' draws.

        Rows that are over go on as padding: their pages may soon be another's.
        """
        self.model.cache.copy(change.copies)
        device = self.tables.device
        # Rows never become fewer while the loop goes on: who sits in the last ones isn't moved
        before = 0 if change.anew else self.rows
        self.rows = max(before, self.bucket(change.slots))
        self.filtered = change.filtered or (self.filtered and not change.anew)
        if self.rows > before:
            self._clear(slice(before, self.rows))
        # Before others join, who may take the rows of those that are over
        if len(change.over):
            self._clear(to_device(change.over, device))
        if change.added.size:
            row, place, page = to_device(change.added, device)
            self.tables[row, place] = page.to(torch.int32)
        if change.joins.size:
            self._join(change, drawn)
        return self._run() if change.runs else None

    def _clear(self, rows: slice | Tensor) -> None:
        """Turn these rows into padding."""
        for state in (*self.values, self.tables):
            if isinstance(rows, slice):
                state[rows].zero_()
            else:
                state.index_fill_(0, rows, 0)

    def _join(self, change: Change, drawn: Tensor | None) -> None:
        device = self.tables.device
        slots, sources, tokens, positions, keys, top_k = to_device(change.joins, device)
        temperature, top_p = to_device(change.chances, device)
        tables = to_device(change.tables, device)
        if drawn is not None and (change.joins[1] >= 0).any():
            # From the device's own draws, which the host may not have seen; −1 is no source
            fresh = drawn[0].index_select(0, sources.clamp(min=0)).long()
            tokens = torch.where(sources >= 0, fresh, tokens)
        targets = *self.values, self.tables[:, : tables.shape[1]]
        joining = tokens, positions, keys, temperature, top_k, top_p, tables
        with in_any_order():
            for target, source in zip(targets, joining, strict=True):
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
                state=(self.tokens, self.positions),
            )
        return send_draws(self.out[:, :rows])

    def _step(self, rows: int, filtered: bool) -> None:
        """What is recorded: from this step's tokens to the next one's."""
        positions = self.positions[:rows]
        x = hidden_states(self.model, self.tokens[:rows], positions, self._pages(rows))
        draws = Draws(
            self.keys[:rows],
            # A draw's noise belongs to the place that its token will have
            positions + 1,
            self.temperature[:rows],
            self.top_k[:rows],
            self.top_p[:rows],
        )
        if self.model.group is None:
            out = scored(self.model, x, draws, filtered)
        else:
            everything = torch.arange(rows, device=positions.device)
            local = everything[: len(x)]
            mine = local + self.model.plan.rank * len(x), local
            out = draw(self.model, x, everything, draws, filtered, mine)
        # This step's draws are the next one's tokens: it can be replayed as it is
        self.out[:, :rows].copy_(out)
        self.tokens[:rows].copy_(out[0])
        self.positions[:rows].add_(1)

    def _pages(self, rows: int) -> Pages:
        """Where the rows' tokens go, and what they see. A row that went on beyond its end stays
        within its table.
        """
        tables = self.tables[:rows]
        find = located
        if tables.is_cuda and self.model.kernels == "triton":
            from retool.engine.kernels.place_triton import located_rows

            # One kernel instead of ten
            find = located_rows
        slots, lengths = find(self.positions[:rows], tables, self.model.cache.page_size)
        return Pages(slots, tables, lengths, rows, each_alone=self.fixed)
