"""The paged KV cache: page numbers with reference counts on the host, keys and values on the
device.

    sequence A   pages 3 7 9         tokens 0…15 | 16…31 | 32…40
    sequence B   pages 3 7 12                              └ own copy, made when A or B first wrote to the shared page 9

Page 0 is never given out: rows that pad a batch write there.

Legend: L layers · P tokens of a page · k this rank's kv heads · H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
import torch.distributed as dist

from retool.engine.schedule.params import EngineOptions
from retool.model.config import ModelConfig

COPIED = 32  # pages at once: they lie in memory a second time meanwhile
CPU_KV_BYTES = 1 << 30  # at most, of memory that isn't touched before it is used


class PagePool:
    """Which pages are free, and how many sequences (or groups) refer to each of the others."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.capacity = pages - 1
        self.free = list(range(pages - 1, 0, -1))
        self.counts = [0] * pages

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def share(self, pages: list[int]) -> None:
        """One reference more to each."""
        for page in pages:
            assert self.counts[page] > 0, f"page {page} is free"
            self.counts[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference less to each; the list is emptied."""
        for page in pages:
            assert self.counts[page] > 0, f"page {page} is free already"
            self.counts[page] -= 1
            if self.counts[page] == 0:
                self.free.append(page)
        pages.clear()

    def missing(self, pages: list[int], start: int, stop: int) -> int:
        """Pages to take before tokens [start, stop) can be written: those beyond the end, and
        copies of shared ones.
        """
        copies = sum(self.counts[p] > 1 for p in pages[start // self.page_size :])
        return max(0, self.pages_for(stop) - len(pages)) + copies

    def extend(self, pages: list[int], start: int, stop: int) -> list[tuple[int, int]] | None:
        """Make tokens [start, stop) writable; returns (from, to) pages to copy, or None, nothing
        changed, if too few are free.
        """
        if self.missing(pages, start, stop) > len(self.free):
            return None
        copies = []
        for i in range(start // self.page_size, len(pages)):
            if self.counts[pages[i]] > 1:
                copies.append((pages[i], self._take()))
                self.release([pages[i]])
                pages[i] = copies[-1][1]
        while len(pages) < self.pages_for(stop):
            pages.append(self._take())
        return copies

    def _take(self) -> int:
        page = self.free.pop()
        self.counts[page] = 1
        return page


class KVCache:
    """Keys and values of all layers: [L, pages, P, 2k, H], a token's k key heads before its k value
    heads.
    """

    def __init__(
        self,
        shape_LPkH: tuple[int, int, int, int],
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layers, self.page_size, self.heads, head_dim = shape_LPkH
        self.data = torch.zeros(
            layers, pages, self.page_size, 2 * self.heads, head_dim, dtype=dtype, device=device
        )

    def write(self, layer: int, slots_T: torch.Tensor, kv_TJH: torch.Tensor) -> None:
        """Store tokens' keys and values (J = 2k heads) at `slots` = page · P + place in the page,
        int64.

        Slots are distinct, but for those of page 0 that nobody reads.
        """
        with in_any_order():
            self.data[layer].flatten(0, 1).index_copy_(0, slots_T, kv_TJH)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages (from, to), in all layers. The host doesn't wait for it."""
        if pairs:
            places = torch.tensor(pairs, pin_memory=self.data.is_cuda).to(
                self.data.device, non_blocking=True
            )
            for some in places.split(COPIED):
                sources, targets = some.unbind(1)
                self.data[:, targets] = self.data[:, sources]


@contextmanager
def in_any_order() -> Iterator[None]:
    """Writes to distinct places, the same in any order: under
    `torch.use_deterministic_algorithms(True)` torch would sort the places first, and in some
    releases wait for the device, which a CUDA graph can't record.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def work_bytes(options: EngineOptions, config: ModelConfig, dtype: torch.dtype) -> int:
    """What a forward needs beside weights and cache: fp32 logits of every sequence, twice, and a
    layer's activations.
    """
    logits = 2 * 4 * options.max_num_seqs * config.vocab
    wider = max(0, config.heads * config.head_dim - config.hidden)  # attention than the model
    return (
        logits
        + options.max_batch_tokens
        * (4 * config.ffn + 14 * config.hidden + 16 * wider)
        * dtype.itemsize
    )


def cache_bytes(
    options: EngineOptions,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None,
    useful: int,
) -> int:
    """Bytes for the cache, of which `useful` are of use; the smallest of the group's, as one page
    table serves all. Collective.
    """
    if options.kv_bytes is not None:
        return options.kv_bytes
    if device.type != "cuda":
        return min(2 * useful + (1 << 20), CPU_KV_BYTES)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    box = torch.tensor(
        [max(0, int((free - work_bytes(options, config, dtype)) * options.kv_share))], device=device
    )
    if group is not None:
        dist.all_reduce(box, dist.ReduceOp.MIN, group=group)
    return int(box)


def page_bytes(shape_LPkH: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Bytes of one page in all layers."""
    return 2 * prod(shape_LPkH) * dtype.itemsize
