# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention of chunks over the paged cache on a GPU: a program has a tile of queries of a head, and
goes over the keys that all of them see, then over those that only some do.

Legend: T tokens of chunks · S chunks · N query heads · J = 2K, keys before values · P tokens of a
page · W pages of the longest sequence · H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retool.engine.kernels.attention_triton import BLOCK, bent, folded, scales
from retool.engine.kernels.pages import Keys, Seen

# Queries at a time and warps, for heads up to so wide
CHUNK_TILES = {128: (64, 4), 256: (32, 8)}


@triton.jit
def _chunk_kernel(
    q_ptr,
    q_row,
    data_ptr,
    page_stride,
    token_stride,
    tables_ptr,
    table_row,
    offsets_ptr,
    lengths_ptr,
    out_ptr,
    scale,
    bend,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    # those with most keys first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    item = tl.program_id(1)
    head = tl.program_id(2)
    begin = tl.load(offsets_ptr + item).to(tl.int64)
    length = tl.load(lengths_ptr + item)
    count = (tl.load(offsets_ptr + item + 1) - begin).to(tl.int32)
    if tile * TILE >= count:
        return
    queries = tile * TILE + tl.arange(0, TILE)
    lanes = tl.arange(0, DIM)
    keys = tl.arange(0, BLOCK)
    real = queries < count
    position = length - count + queries
    q = tl.load(
        q_ptr + (begin + queries)[:, None] * q_row + head * DIM + lanes[None, :],
        real[:, None],
        other=0.0,
    )
    tokens = data_ptr + keys[:, None] * token_stride + (head // GROUP) * DIM + lanes[None, :]
    table = tables_ptr + item * table_row
    largest = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    result = tl.zeros((TILE, DIM), tl.float32)
    # Whole blocks that even the first query sees
    common = (length - count + tile * TILE + 1) // BLOCK * BLOCK
    if WINDOW:
        # What the first query doesn't see none does; which of the rest a query sees, each says
        common = tl.maximum(length - count + tile * TILE + 1 - window, 0) // BLOCK * BLOCK
    for start in range(common if WINDOW else 0, common, BLOCK):
        token = (
            tokens
            + tl.load(table + start // PAGE).to(tl.int64) * page_stride
            + start % PAGE * token_stride
        )
        scores = bent(tl.dot(q, tl.trans(tl.load(token))), bend, CAP)
        largest, total, result = folded(
            scores, scale, tl.load(token + HEADS // GROUP * DIM), largest, total, result, False
        )
    for start in range(common, length - count + tl.minimum((tile + 1) * TILE, count), BLOCK):
        token = (
            tokens
            + tl.load(table + start // PAGE).to(tl.int64) * page_stride
            + start % PAGE * token_stride
        )
        v = tl.load(token + HEADS // GROUP * DIM, (start + keys < length)[:, None], other=0.0)
        seen = start + keys[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (start + keys[None, :] > position[:, None] - window)
        scores = bent(tl.dot(q, tl.trans(tl.load(token))), bend, CAP)
        scores = tl.where(seen, scores, -float("inf"))
        largest, total, result = folded(scores, scale, v, largest, total, result, WINDOW)
    out = out_ptr + ((begin + queries)[:, None] * HEADS + head) * DIM + lanes[None, :]
    tl.store(out, (result / total[:, None]).to(out_ptr.dtype.element_ty), real[:, None])


class Chunks(NamedTuple):
    """Chunks' queries lie at `offsets` int32 [S + 1], and are the last of their sequence's `keys`. None is
    longer than `longest`.
    """

    keys: Keys
    offsets: Tensor
    longest: int


def chunk_rows(q_TNH: Tensor, data: Tensor, chunks: Chunks, seen: Seen) -> Tensor:
    """out [T, N, H], causal. What belongs to no chunk isn't written.

    `data` is a layer of the cache, [pages, P, J, H].
    """
    tables_SW, lengths_S = chunks.keys
    window, cap = seen
    tokens, heads, dim = q_TNH.shape
    kv_heads = data.shape[2] // 2
    out = torch.empty(tokens, heads, dim, dtype=q_TNH.dtype, device=q_TNH.device)
    tile, warps = next(config for widest, config in CHUNK_TILES.items() if dim <= widest)
    _chunk_kernel[(triton.cdiv(chunks.longest, tile), len(tables_SW), heads)](
        q_TNH,
        q_TNH.stride(0),
        data,
        data.stride(0),
        data.stride(1),
        tables_SW,
        tables_SW.stride(0),
        chunks.offsets,
        lengths_S,
        out,
        *scales(dim, cap),
        window,
        HEADS=heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        PAGE=data.shape[1],
        TILE=tile,
        CAP=cap > 0,
        WINDOW=window > 0,
        num_warps=warps,
        num_stages=2,
    )
    return out
