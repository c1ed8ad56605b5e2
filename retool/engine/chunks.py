"""Chunks: several tokens of a sequence at once, of prompts and tool texts, in one of few shapes
that a recorded graph can run.

    tokens    | chunk | chunk | … | padding | padding | …            |
    items     | chunk | chunk | … | padding | padding | … | none | … |

There are T tokens, a power of two and 256 at least; S items (16, 64, 256, …), none of them longer
than M tokens (256, 2,048, …, T).

A forward with shapes of its own costs the host more than the GPU: see `benchmarks/RESULTS.md`.

[Note: padding] Padding is written to page 0, which nobody reads, and attends to that page, in items
of up to `PADDING` tokens. Every query needs a key: flash-attn's paged kernel (2.8) writes outside
of its memory for a block of queries that has none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retool.engine.forward import Model, hidden_states
from retool.engine.kernels.attention import Pages
from retool.engine.runner import Flight, Recordings, drawn, to_device
from retool.engine.schedule.batch import Batch

PADDING = 256


class Chunks:
    """Runs batches without single tokens, of up to `tokens` in up to `items` chunks, with page
    tables of up to `width` pages.
    """

    def __init__(
        self, model: Model, tokens: int, items: int, width: int, recordings: Recordings | None
    ) -> None:
        device = model.cache.data.device
        ranks = model.plan.sp
        self.model = model
        self.recordings = recordings
        self.padding = min(PADDING, width * model.cache.page_size)
        self.most_tokens = -(-max(tokens, PADDING) // ranks) * ranks
        self.most_items = items + -(-self.most_tokens // self.padding)
        # tokens, positions, slots
        self.inputs = torch.zeros(3, self.most_tokens, dtype=torch.int64, device=device)
        self.tables = torch.zeros(self.most_items, width, dtype=torch.int32, device=device)
        # Of every item's tokens and keys, from 0
        self.ends = torch.zeros(2, self.most_items + 1, dtype=torch.int32, device=device)
        # What the blocks made of the tokens: one place for all shapes
        self.hidden = torch.empty(0, device=device)

    def shape(self, tokens: int, items: int, longest: int) -> tuple[int, int, int]:
        """(T, S, M) of the recorded step that runs so many, S with room for the padding.

        The kernel starts programs for S items of M.
        """
        ranks = self.model.plan.sp
        few = 16
        long = PADDING
        many = min(self.most_tokens, -(-max(256, 1 << (tokens - 1).bit_length()) // ranks) * ranks)
        while few < items + -(-(many - tokens) // self.padding):
            few *= 4
        while long < longest:
            long *= 8
        return many, min(self.most_items, few), min(many, long)

    def run(self, batch: Batch) -> Flight:
        """Compute and draw; the batch has chunks only."""
        self.model.cache.copy(batch.copies)
        shape = self.shape(len(batch.tokens), len(batch.counts), int(batch.counts.max()))
        self._fill(batch, *shape[:2])
        x = self._place(shape[0])
        if self.recordings is None:
            self._step(*shape)
        else:
            self.recordings.run(("chunks", *shape), lambda: self._step(*shape))
        return drawn(self.model, x, batch)

    def _place(self, tokens: int) -> Tensor:
        """[t, D] of `hidden`, which never moves once a graph writes there."""
        if not len(self.hidden):
            decoder = self.model.decoder
            most = self.most_tokens // self.model.plan.sp
            dtype = decoder.residual_dtype(self.model.cache.data.dtype)
            self.hidden = self.hidden.new_empty(most, decoder.config.hidden, dtype=dtype)
        return self.hidden[: tokens // self.model.plan.sp]

    def _fill(self, batch: Batch, tokens: int, items: int) -> None:
        device = self.inputs.device
        count = len(batch.tokens)
        chunks = len(batch.counts)
        inputs = np.zeros((3, tokens), np.int64)
        inputs[:, :count] = batch.tokens, batch.positions, batch.slots
        inputs[1, count:] = np.arange(tokens - count) % self.padding
        tables = np.zeros((items, self.tables.shape[1]), np.int32)
        tables[:chunks, : batch.tables.shape[1]] = batch.tables
        ends = np.zeros((2, items + 1), np.int32)
        ends[:, 1 : chunks + 1] = np.cumsum([batch.counts, batch.lengths], 1)
        # By the padding, item for item
        filled = np.minimum(np.arange(1, items - chunks + 1) * self.padding, tokens - count)
        ends[:, chunks + 1 :] = ends[:, chunks, None] + filled
        for target, source in (
            (self.inputs[:, :tokens], inputs),
            (self.tables[:items], tables),
            (self.ends[:, : items + 1], ends),
        ):
            target.copy_(to_device(source, device))

    def _step(self, tokens: int, items: int, longest: int) -> None:
        ids, positions, slots = self.inputs[:, :tokens]
        offsets, key_offsets = self.ends[:, : items + 1]
        tables = self.tables[:items]
        keys = tables.shape[1] * self.model.cache.page_size
        pages = Pages(
            slots,
            tables,
            key_offsets.diff(),
            0,
            offsets,
            key_offsets,
            counts=(longest,),
            host_lengths=(keys,),
        )
        self._place(tokens).copy_(hidden_states(self.model, ids, positions, pages))
