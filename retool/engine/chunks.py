"""Chunks: several tokens of a sequence at once, of prompts and tool texts, in one of few shapes
that a recorded graph can run.

    tokens    | chunk | chunk | … | padding | padding | …            |
    items     | chunk | chunk | … | padding | padding | … | none | … |

There are T tokens, a power of two and 256 at least; S items (16, 64, 256, …), none of them longer
than M tokens (256, 2,048, …, T).

A forward with shapes of its own costs the host more than the GPU: see `benchmarks/RESULTS.md`.

[Note: padding] Padding is written to page 0, which nobody reads, and attends to that page, in items
of up to `MAX_PADDING_TOKENS`. Every query needs a key: flash-attn's paged kernel (2.8) writes outside
of its memory for a block of queries that has none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retool.engine.forward import Model, hidden_states
from retool.engine.kernels.pages import Pages
from retool.engine.runner import Flight, Recordings, draw_rows, to_device
from retool.engine.schedule.batch import Batch

MAX_PADDING_TOKENS = 256  # of one item
MIN_TOKENS = 256  # T
MIN_ITEMS = 16  # S, and four times as many, and so on
MIN_LONGEST = 256  # M, and eight times as many, and so on


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
        # Tokens of a padding item, whose page table must have room for as many keys
        self.padding = min(MAX_PADDING_TOKENS, width * model.cache.page_size)
        self.most_tokens = -(-max(tokens, MAX_PADDING_TOKENS) // ranks) * ranks
        self.most_items = items + -(-self.most_tokens // self.padding)
        # tokens, positions, slots
        self.inputs = torch.zeros(3, self.most_tokens, dtype=torch.int64, device=device)
        self.tables = torch.zeros(self.most_items, width, dtype=torch.int32, device=device)
        # Where every item's tokens and keys end, counted from 0
        self.ends = torch.zeros(2, self.most_items + 1, dtype=torch.int32, device=device)
        # What the blocks made of the tokens: one place for all shapes
        self.hidden = torch.empty(0, device=device)

    def shape(self, tokens: int, items: int, longest: int) -> tuple[int, int, int]:
        """(T, S, M) of the recorded step that runs so many, S with room for the padding.

        The kernel starts programs for S items of M.
        """
        ranks = self.model.plan.sp
        power_of_two = 1 << (tokens - 1).bit_length()
        most = min(self.most_tokens, -(-max(MIN_TOKENS, power_of_two) // ranks) * ranks)
        padding_items = -(-(most - tokens) // self.padding)
        few = MIN_ITEMS
        # Few shapes, far apart: each is recorded once, and keeps memory
        while few < items + padding_items:
            few *= 4
        long = MIN_LONGEST
        while long < longest:
            long *= 8
        return most, min(self.most_items, few), min(most, long)

    def run(self, batch: Batch) -> Flight:
        """Compute and draw; the batch has chunks only."""
        self.model.cache.copy(batch.copies)
        shape = self.shape(len(batch.tokens), len(batch.counts), int(batch.counts.max()))
        tokens, items, _ = shape
        self._fill(batch, tokens, items)
        x = self._place(tokens)
        if self.recordings is None:
            self._step(*shape)
        else:
            self.recordings.run(("chunks", *shape), lambda: self._step(*shape))
        return draw_rows(self.model, x, batch)

    def _place(self, tokens: int) -> Tensor:
        """[t, D] of `hidden`, which never moves once a graph writes there."""
        if not len(self.hidden):
            decoder = self.model.decoder
            most = self.most_tokens // self.model.plan.sp
            dtype = decoder.residual_dtype(self.model.cache.data.dtype)
            self.hidden = self.hidden.new_empty(most, decoder.config.hidden, dtype=dtype)
        return self.hidden[: tokens // self.model.plan.sp]

    def _fill(self, batch: Batch, tokens: int, items: int) -> None:
        """The batch and its padding, to where the recorded step reads them."""
        device = self.inputs.device
        count = len(batch.tokens)
        chunks = len(batch.counts)

        inputs = np.zeros((3, tokens), np.int64)
        inputs[:, :count] = batch.tokens, batch.positions, batch.slots
        # Of padding only the positions count: tokens and slots of 0 are page 0's
        inputs[1, count:] = np.arange(tokens - count) % self.padding

        tables = np.zeros((items, self.tables.shape[1]), np.int32)
        tables[:chunks, : batch.tables.shape[1]] = batch.tables

        # Padding fills item after item; those behind it are empty
        ends = np.zeros((2, items + 1), np.int32)
        ends[:, 1 : chunks + 1] = np.cumsum([batch.counts, batch.lengths], 1)
        padded = np.minimum(np.arange(1, items - chunks + 1) * self.padding, tokens - count)
        ends[:, chunks + 1 :] = ends[:, chunks, None] + padded

        self.inputs[:, :tokens].copy_(to_device(inputs, device))
        self.tables[:items].copy_(to_device(tables, device))
        self.ends[:, : items + 1].copy_(to_device(ends, device))

    def _step(self, tokens: int, items: int, longest: int) -> None:
        """What is recorded."""
        ids, positions, slots = self.inputs[:, :tokens]
        offsets, key_offsets = self.ends[:, : items + 1]
        tables = self.tables[:items]
        pages = Pages(
            slots=slots,
            tables=tables,
            lengths=key_offsets.diff(),
            decode=0,
            offsets=offsets,
            key_offsets=key_offsets,
            counts=(longest,),
            host_lengths=(tables.shape[1] * self.model.cache.page_size,),
        )
        self._place(tokens).copy_(hidden_states(self.model, ids, positions, pages))
