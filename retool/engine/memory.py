"""How many bytes an engine takes on one GPU: weights, the work space of a forward, and the KV
cache.

Preflight plans with the same functions that the engine allocates by.

Legend: L layers · P tokens of a page · k kv heads that this rank caches · H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from retool.engine.types import EngineOptions
from retool.model.config import ModelConfig
from retool.parallel.fsdp.layout import Layout
from retool.parallel.ulysses import HeadPlan

# Tokens. All kernels of a GPU take it
GPU_PAGE_SIZE = 256
CPU_PAGE_SIZE = 16
MAX_CPU_KV_BYTES = 1 << 30  # of memory that isn't touched before it is used


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one GPU: the weights, what a forward needs beside them, and one `page` of the KV
    cache, of `page_size` tokens, in all layers.
    """

    weights: int
    work: int
    page: int
    page_size: int


def engine_memory(
    config: ModelConfig, options: EngineOptions, dtype: torch.dtype, ranks: int, layout: Layout
) -> EngineMemory:
    """What an engine takes on the first of `ranks` GPUs, which caches as many heads as any."""
    plan = HeadPlan(ranks, 0, config.heads, config.kv_heads, config.head_dim)
    page_size = options.page_size or GPU_PAGE_SIZE
    shape = config.layers, page_size, cached_heads(plan), config.head_dim
    return EngineMemory(
        weights=sum(unit.numel for unit in layout.units) * dtype.itemsize,
        work=work_bytes(options, config, dtype),
        page=page_bytes(shape, dtype),
        page_size=page_size,
    )


def cached_heads(plan: HeadPlan) -> int:
    """Kv heads that this rank's cache holds: one per query head where its query heads don't group
    evenly.
    """
    ranges = plan.query_ranges if plan.expansion else plan.kv_ranges
    return len(ranges[plan.rank])


def page_bytes(shape_LPkH: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Bytes of one page, keys and values, in all layers."""
    return 2 * prod(shape_LPkH) * dtype.itemsize


def useful_bytes(options: EngineOptions, longest: int, page_size: int, page: int) -> int:
    """What all sequences take in pages of `page` bytes when each has `longest` tokens and begins one
    more.
    """
    return options.max_num_seqs * (longest // page_size + 1) * page


def work_bytes(options: EngineOptions, config: ModelConfig, dtype: torch.dtype) -> int:
    """What a forward needs beside weights and cache: fp32 logits of every sequence, twice, and a
    layer's activations.
    """
    # Every sequence draws at once at most: a row of fp32 logits each, and what sampling makes of
    # it.
    logits = 2 * 4 * options.max_num_seqs * config.vocab
    # Where attention is wider than the model
    wider = max(0, config.heads * config.head_dim - config.hidden)
    # A token is there once for each of its experts
    copies = 1 if config.experts is None else config.experts.per_token
    mlp = copies * 4 * config.ffn
    for_experts = 0 if config.experts is None else copies * 3 * config.hidden
    per_token = mlp + for_experts + 14 * config.hidden + 16 * wider
    return logits + options.max_batch_tokens * per_token * dtype.itemsize


def cache_bytes(
    options: EngineOptions,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None,
    useful: int,
    weights: int = 0,
) -> int:
    """Bytes for the KV cache, of which `useful` are of use, where `weights` are still to come.
    Collective.

    The smallest of the group's, as one page table serves all of its ranks.
    """
    if options.kv_bytes is not None:
        return options.kv_bytes
    if device.type != "cuda":
        # Generous, and for nothing: the system gives no page before it is written
        return min(2 * useful + (1 << 20), MAX_CPU_KV_BYTES)
    # What torch holds and nobody uses counts as taken otherwise.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    share = int((free - weights - work_bytes(options, config, dtype)) * options.kv_share)
    box = torch.tensor([max(0, share)], device=device)
    if group is not None:
        # The ranks of a group plan alike: all have as many pages as the one with the least room.
        dist.all_reduce(box, dist.ReduceOp.MIN, group=group)
    return int(box)
