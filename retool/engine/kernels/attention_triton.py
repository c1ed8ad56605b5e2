# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention over the paged cache on a GPU.

Single tokens: each sequence's keys are cut into parts by its own length, so that few or long
sequences keep every multiprocessor reading (Flash-Decoding: Dao, Haziza, Massa & Sizov 2023; the
softmax of parts: arXiv 2205.14135).

    part     (sequence, kv heads, part): their query heads over a range of keys, normalised, with their log-sum-exp
    joined   (sequence, query head): the parts' results, weighted by their share

flash-attn cuts all of them by the longest that the page table has room for, and most sequences of a
rollout are much shorter. Where kv heads are narrow and few query heads read them, a program takes
several: it reads longer pieces of memory, and a query is zero where another head's keys are.

Chunks: a program has a tile of queries of a head, and goes over the keys that all of them see, then
over those that only some do.

Legend: T tokens of chunks · S chunks · D sequences · N query heads · K kv heads · J = 2K, keys before
values · G query heads per kv head · P tokens of a page · W pages of the longest sequence · H head dim.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from retool.engine.kernels.kv_cache import HEAD_DIMS

BLOCK = 64  # keys at a time: within a page
LOWEST = tl.constexpr(-1e30)  # below every score
# Single tokens
TARGET_PROGRAMS = 512  # about so many parts in all: more of them only cost more to join
MAX_PARTS = 64  # of a sequence
MAX_KEY_WIDTH = 128  # numbers of a token's key that a program reads
WARPS = 2
STAGES = 3  # of the pipeline of loads
# Chunks: queries at a time and warps, for heads up to so wide
CHUNK_TILES = {128: (64, 4), 256: (32, 8)}


@triton.jit
def _bent(scores, bend, CAP: tl.constexpr):
    """tanh(scores · bend) with CAP: the cap itself is in the scale that follows."""
    if CAP:
        scores = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores * bend))
    return scores


@triton.jit
def _folded(scores, scale, v, largest, total, result, MAY_SEE_NONE: tl.constexpr):
    """A running softmax, one block of keys further.

    Returns the largest scaled score (of base 2), the sum of all relative to it, and the values' sum,
    relative to it too. MAY_SEE_NONE: of the blocks so far a query may have seen no key.
    """
    above = tl.maximum(largest, tl.max(scores, 1) * scale)
    if MAY_SEE_NONE:
        # Minus infinity has no distance to itself
        above = tl.maximum(above, LOWEST)
    decay = tl.exp2(largest - above)
    p = tl.exp2(scores * scale - above[:, None])
    return above, total * decay + tl.sum(p, 1), result * decay[:, None] + tl.dot(p.to(v.dtype), v)


@triton.jit
def _attention_kernel(
    q_ptr,
    q_row,
    data_ptr,
    page_stride,
    token_stride,
    tables_ptr,
    table_row,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    scale,
    bend,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TOGETHER
    part = tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    blocks = tl.cdiv(length, BLOCK)
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - window, 0) // BLOCK
    each = tl.cdiv(blocks - begin, PARTS)
    first = begin + part * each
    last = tl.minimum(first + each, blocks)
    queries = tl.arange(0, QUERIES)
    lanes = tl.arange(0, TOGETHER * DIM)
    keys = tl.arange(0, BLOCK)
    mine = head * GROUP + queries
    real = queries < TOGETHER * GROUP
    own = real[:, None] & (queries[:, None] // GROUP == lanes[None, :] // DIM)
    place = mine[:, None] * DIM + lanes[None, :] % DIM
    q = tl.load(q_ptr + row * q_row + place, own, other=0.0)
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, TOGETHER * DIM), tl.float32)
    for block in range(first, last):
        start = block * BLOCK
        page = tl.load(tables_ptr + row * table_row + start // PAGE).to(tl.int64)
        token = (
            data_ptr
            + page * page_stride
            + (start % PAGE + keys)[:, None] * token_stride
            + head * DIM
            + lanes[None, :]
        )
        seen = start + keys < length
        if WINDOW:
            seen = seen & (start + keys >= length - window)
        k = tl.load(token)
        # What was never written may be no number
        v = tl.load(token + KV_HEADS * DIM, seen[:, None], other=0.0)
        scores = _bent(tl.dot(q, tl.trans(k)), bend, CAP)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        largest, total, result = _folded(scores, scale, v, largest, total, result, False)
    if first < last:
        result = result / total[:, None]
    at = (row * HEADS + mine) * PARTS + part
    if PARTS > 1:
        # Minus infinity for a part without keys
        tl.store(lse_ptr + at, largest + tl.log2(total), real)
    tl.store(
        out_ptr + at[:, None] * DIM + lanes[None, :] % DIM, result.to(out_ptr.dtype.element_ty), own
    )


@triton.jit
def _joined_kernel(parts_ptr, lse_ptr, out_ptr, DIM: tl.constexpr, PARTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, DIM)
    parts = tl.arange(0, PARTS)
    lse = tl.load(lse_ptr + at * PARTS + parts)
    share = tl.exp2(lse - tl.max(lse, 0))
    share = share / tl.sum(share, 0)
    found = tl.load(parts_ptr + (at * PARTS + parts)[:, None] * DIM + lanes[None, :])
    tl.store(
        out_ptr + at * DIM + lanes, tl.sum(found * share[:, None], 0).to(out_ptr.dtype.element_ty)
    )


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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
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
        scores = _bent(tl.dot(q, tl.trans(tl.load(token))), bend, CAP)
        largest, total, result = _folded(
            scores, scale, tl.load(token + KV_HEADS * DIM), largest, total, result, False
        )
    for start in range(common, length - count + tl.minimum((tile + 1) * TILE, count), BLOCK):
        token = (
            tokens
            + tl.load(table + start // PAGE).to(tl.int64) * page_stride
            + start % PAGE * token_stride
        )
        v = tl.load(token + KV_HEADS * DIM, (start + keys < length)[:, None], other=0.0)
        seen = start + keys[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (start + keys[None, :] > position[:, None] - window)
        scores = _bent(tl.dot(q, tl.trans(tl.load(token))), bend, CAP)
        scores = tl.where(seen, scores, -float("inf"))
        largest, total, result = _folded(scores, scale, v, largest, total, result, WINDOW)
    out = out_ptr + ((begin + queries)[:, None] * HEADS + head) * DIM + lanes[None, :]
    tl.store(out, (result / total[:, None]).to(out_ptr.dtype.element_ty), real[:, None])


def fits(head_dim: int, page_size: int) -> bool:
    """Whether the kernels can take these shapes."""
    return head_dim in HEAD_DIMS and page_size % BLOCK == 0


def heads_together(kv_heads: int, group: int, dim: int) -> int:
    """Kv heads of a program: a power of two that divides them, while their query heads fit in one
    tile of 16.
    """
    together = 1
    while (
        kv_heads % (2 * together) == 0
        and 2 * together * group <= 16
        and 2 * together * dim <= MAX_KEY_WIDTH
    ):
        together *= 2
    return together


def parts_for(programs: int) -> int:
    """How many parts each sequence is cut into, of which each takes so many programs: a power of
    two, whatever the lengths.
    """
    return min(MAX_PARTS, 1 << max(0, (TARGET_PROGRAMS // programs).bit_length() - 1))


def _scales(dim: int, cap: float) -> tuple[float, float]:
    """(scale, bend): scores of base 2 are scale · product, or scale · tanh(bend · product) with a cap."""
    if cap:
        return cap * math.log2(math.e), 1 / (cap * math.sqrt(dim))
    return math.log2(math.e) / math.sqrt(dim), 0.0


def decode_rows(
    q_DNH: Tensor,
    data: Tensor,
    tables_DW: Tensor,
    lengths_D: Tensor,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """out [D, N, H] of a query per sequence over the first `lengths` (at least 1) keys on its pages.

    `data` is a layer of the cache, [pages, P, J, H]. `window` and `cap` are those of
    `paged_attention`. A sequence's numbers depend on how many the others are, not on their lengths.
    """
    rows, heads, dim = q_DNH.shape
    kv_heads = data.shape[2] // 2
    group = heads // kv_heads
    together = heads_together(kv_heads, group, dim)
    parts = parts_for(rows * kv_heads // together)
    out = torch.empty(rows, heads, dim, dtype=q_DNH.dtype, device=q_DNH.device)
    # A single part is the result
    found = out
    lse = out
    if parts > 1:
        found = torch.empty(rows, heads, parts, dim, dtype=torch.float32, device=q_DNH.device)
        lse = torch.empty(rows, heads, parts, dtype=torch.float32, device=q_DNH.device)
    _attention_kernel[(rows, kv_heads // together, parts)](
        q_DNH,
        q_DNH.stride(0),
        data,
        data.stride(0),
        data.stride(1),
        tables_DW,
        tables_DW.stride(0),
        lengths_D,
        found,
        lse,
        *_scales(dim, cap),
        window,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=group,
        TOGETHER=together,
        QUERIES=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        PAGE=data.shape[1],
        BLOCK=BLOCK,
        PARTS=parts,
        CAP=cap > 0,
        WINDOW=window > 0,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    if parts > 1:
        _joined_kernel[(rows * heads,)](found, lse, out, DIM=dim, PARTS=parts, num_warps=1)
    return out


def chunk_rows(
    q_TNH: Tensor,
    data: Tensor,
    tables_SW: Tensor,
    lengths_S: Tensor,
    offsets: Tensor,
    longest: int,
    window: int = 0,
    cap: float = 0.0,
) -> Tensor:
    """out [T, N, H] of chunks, causal; `window` and `cap` as in `decode_rows`.

    A chunk's queries lie at `offsets` [S + 1], and are the last of their sequence's `lengths` keys.
    No chunk is longer than `longest`; what belongs to none isn't written.
    """
    tokens, heads, dim = q_TNH.shape
    kv_heads = data.shape[2] // 2
    out = torch.empty(tokens, heads, dim, dtype=q_TNH.dtype, device=q_TNH.device)
    tile, warps = next(config for widest, config in CHUNK_TILES.items() if dim <= widest)
    _chunk_kernel[(triton.cdiv(longest, tile), len(tables_SW), heads)](
        q_TNH,
        q_TNH.stride(0),
        data,
        data.stride(0),
        data.stride(1),
        tables_SW,
        tables_SW.stride(0),
        offsets,
        lengths_S,
        out,
        *_scales(dim, cap),
        window,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        PAGE=data.shape[1],
        TILE=tile,
        BLOCK=BLOCK,
        CAP=cap > 0,
        WINDOW=window > 0,
        num_warps=warps,
        num_stages=2,
    )
    return out
