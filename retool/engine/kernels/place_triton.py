# ruff: noqa: ANN001, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""q, k and v of new tokens in one kernel, see `place.py`: a program has all heads of a token, each
as two halves that rope turns. And where a decode step's tokens go, see `kv_cache.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

Norms = tuple[Tensor, Tensor, float]  # weights [H] of q's and k's norm, and its epsilon


@triton.jit
def _place_kernel(
    heads_ptr,
    row,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    slots_ptr,
    query_ptr,
    data_ptr,
    token_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    MANY: tl.constexpr,
    HALF: tl.constexpr,
    NORMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, MANY)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    at = heads_ptr + token * row + head * 2 * HALF + lane
    there = head < HEADS + 2 * KV_HEADS
    is_query = head < HEADS
    turns = head < HEADS + KV_HEADS  # values don't
    low = tl.load(at, there, other=0.0)
    high = tl.load(at + HALF, there, other=0.0)
    dtype = low.dtype
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + lane)
    sin = tl.load(sin_ptr + token * HALF + lane)
    if NORMS:
        square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        shrink = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
        q_low = tl.load(q_norm_ptr + lane)
        k_low = tl.load(k_norm_ptr + lane)
        q_high = tl.load(q_norm_ptr + HALF + lane)
        k_high = tl.load(k_norm_ptr + HALF + lane)
        low_weight = tl.where(is_query, q_low, k_low).to(tl.float32)
        high_weight = tl.where(is_query, q_high, k_high).to(tl.float32)
        low = tl.where(turns, low * shrink * low_weight, low)
        high = tl.where(turns, high * shrink * high_weight, high)
    first = tl.where(turns, low * cos - high * sin, low).to(dtype)
    second = tl.where(turns, high * cos + low * sin, high).to(dtype)
    query = query_ptr + (token * HEADS + head) * 2 * HALF + lane
    tl.store(query, first, is_query)
    tl.store(query + HALF, second, is_query)
    kept = data_ptr + tl.load(slots_ptr + token) * token_stride + (head - HEADS) * 2 * HALF + lane
    tl.store(kept, first, there & (head >= HEADS))
    tl.store(kept + HALF, second, there & (head >= HEADS))


@triton.jit
def _located_kernel(
    positions_ptr,
    tables_ptr,
    table_row,
    slots_ptr,
    lengths_ptr,
    rows,
    width,
    PAGE: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = row < rows
    position = tl.load(positions_ptr + row, there, other=0)
    place = tl.minimum(position // PAGE, width - 1)
    page = tl.load(tables_ptr + row * table_row + place, there, other=0).to(tl.int64)
    tl.store(slots_ptr + row, page * PAGE + position % PAGE, there)
    length = tl.minimum(position + 1, width * PAGE)
    tl.store(lengths_ptr + row, length.to(tl.int32), there)


def located_rows(positions_R: Tensor, tables_RW: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`located`, on a GPU."""
    rows, width = tables_RW.shape
    slots = torch.empty_like(positions_R)
    lengths = torch.empty(rows, dtype=torch.int32, device=positions_R.device)
    _located_kernel[(triton.cdiv(rows, 128),)](
        positions_R,
        tables_RW,
        tables_RW.stride(0),
        slots,
        lengths,
        rows,
        width,
        PAGE=size,
        LANES=128,
        num_warps=4,
    )
    return slots, lengths


def place_rows(
    heads_TJH: Tensor, cos: Tensor, sin: Tensor, norms: Norms | None, slots_T: Tensor, data: Tensor
) -> Tensor:
    """`place`, on a GPU."""
    tokens, all_heads, dim = heads_TJH.shape
    kv_heads = data.shape[2] // 2
    heads = all_heads - 2 * kv_heads
    query = torch.empty(tokens, heads, dim, dtype=heads_TJH.dtype, device=heads_TJH.device)
    many = triton.next_power_of_2(all_heads)
    half = dim // 2
    q_norm, k_norm, eps = norms or (heads_TJH, heads_TJH, 0.0)
    _place_kernel[(tokens,)](
        heads_TJH,
        heads_TJH.stride(0),
        cos,
        sin,
        q_norm,
        k_norm,
        eps,
        slots_T,
        query,
        data,
        data.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        MANY=many,
        HALF=half,
        NORMS=norms is not None,
        num_warps=4 if many * half <= 2048 else 8,
    )
    return query
