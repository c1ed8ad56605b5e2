# ruff: noqa: ANN001, ANN201, ANN202 — a kernel's arguments are pointers and numbers of Triton's own
# pyright: reportMissingParameterType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention of single tokens over the paged cache on a GPU, and what chunks' has in common with it.

Each sequence's keys are cut into parts by its own length, so that few or long sequences keep every
multiprocessor reading (Flash-Decoding: Dao, Haziza, Massa & Sizov 2023; the softmax of parts: arXiv
2205.14135).

    part     (sequence, kv heads, part): their query heads over a range of keys, normalised, with their log-sum-exp
    joined   (sequence, query head): the parts' results, weighted by their share

How many parts all of them have follows from how many sequences there are. One that is much longer
has more, where the page table has room for such.

flash-attn cuts all of them by the longest that the page table has room for, and most sequences of a
rollout are much shorter. Where kv heads are narrow and few query heads read them, a program takes
several: it reads longer pieces of memory, and a query is zero where another head's keys are.

Legend: D sequences · N query heads · K kv heads · J = 2K, keys before values · G query heads per kv
head · P tokens of a page · W pages of the longest sequence · H head dim.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from retool.engine.kernels.kv_cache import HEAD_DIMS
from retool.engine.kernels.pages import Keys, Seen

BLOCK = tl.constexpr(64)  # keys at a time: within a page
LOWEST = tl.constexpr(-1e30)  # below every score
TARGET_PROGRAMS = 512  # about so many parts in all: more of them only cost more to join
FULL_PROGRAMS = 256  # two for each multiprocessor: with blocks enough under way no part is needed
MAX_PARTS = 64  # of a sequence
LONG = 4096  # keys of a part, from which a sequence is cut into more than the others
MORE_PARTS = 4  # times as many, at most
MAX_KEY_WIDTH = 128  # numbers of a token's key that a program reads
DEEP_BYTES = 112 << 10  # of shared memory, which a deep pipeline takes at that width


class Pipeline(NamedTuple):
    """A program's warps, and the stages of its loads. Two of them are the page table's, and two more
    are one more block of keys under way.
    """

    warps: int
    stages: int


SHALLOW = Pipeline(2, 3)
DEEP = Pipeline(4, 7)


@triton.jit
def bent(scores, bend, CAP: tl.constexpr):
    """tanh(scores · bend) with CAP: the cap itself is in the scale that follows."""
    if CAP:
        scores = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores * bend))
    return scores


@triton.jit
def folded(scores, scale, v, largest, total, result, MAY_SEE_NONE: tl.constexpr):
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
def _cut(
    length,
    window,
    FEWEST: tl.constexpr,
    PARTS: tl.constexpr,
    LONG: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The first block of keys that is seen, the blocks of all keys, and in how many parts they are
    read.
    """
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - window, 0) // BLOCK
    blocks = tl.cdiv(length, BLOCK)
    parts = FEWEST
    if PARTS > FEWEST:
        parts = tl.minimum(tl.maximum(tl.cdiv((blocks - begin) * BLOCK, LONG), FEWEST), PARTS)
    return begin, blocks, parts


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
    parts_ptr,
    lse_ptr,
    scale,
    bend,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FEWEST: tl.constexpr,
    PARTS: tl.constexpr,
    LONG: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TOGETHER
    part = tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    begin, blocks, parts = _cut(length, window, FEWEST, PARTS, LONG, WINDOW)
    if part >= parts:
        return
    each = tl.cdiv(blocks - begin, parts)
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
        v = tl.load(token + HEADS // GROUP * DIM, seen[:, None], other=0.0)
        scores = bent(tl.dot(q, tl.trans(k)), bend, CAP)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        largest, total, result = folded(scores, scale, v, largest, total, result, False)
    if first < last:
        result = result / total[:, None]
    at = row * HEADS + mine
    if parts == 1:
        lane = at[:, None] * DIM + lanes[None, :] % DIM
        tl.store(out_ptr + lane, result.to(out_ptr.dtype.element_ty), own)
    else:
        at = at * PARTS + part
        # Minus infinity for a part without keys
        tl.store(lse_ptr + at, largest + tl.log2(total), real)
        tl.store(parts_ptr + at[:, None] * DIM + lanes[None, :] % DIM, result, own)


@triton.jit
def _joined_kernel(
    parts_ptr,
    lse_ptr,
    lengths_ptr,
    out_ptr,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FEWEST: tl.constexpr,
    PARTS: tl.constexpr,
    LONG: tl.constexpr,
    WINDOW: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + at // HEADS)
    _, _, parts = _cut(length, window, FEWEST, PARTS, LONG, WINDOW)
    lanes = tl.arange(0, DIM)
    part = tl.arange(0, PARTS)
    # A single part was the result
    if parts > 1:
        there = part < parts
        lse = tl.load(lse_ptr + at * PARTS + part, there, other=-float("inf"))
        share = tl.exp2(lse - tl.max(lse, 0))
        share = share / tl.sum(share, 0)
        places = parts_ptr + (at * PARTS + part)[:, None] * DIM + lanes[None, :]
        found = tl.load(places, there[:, None], other=0.0)
        joined = tl.sum(found * share[:, None], 0)
        tl.store(out_ptr + at * DIM + lanes, joined.to(out_ptr.dtype.element_ty))


def fits(head_dim: int, page_size: int) -> bool:
    """Whether the kernels can take these shapes."""
    return head_dim in HEAD_DIMS and page_size % BLOCK.value == 0


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


def reading(programs: int, deep: bool) -> tuple[int, Pipeline]:
    """How many parts each sequence is cut into at least, of which each takes so many programs: a
    power of two, whatever the lengths; and how a part is read. `deep`: whether that may be deep.
    """
    if deep and FULL_PROGRAMS <= programs < TARGET_PROGRAMS:
        return 1, DEEP
    parts = 1 << max(0, (TARGET_PROGRAMS // programs).bit_length() - 1)
    return min(MAX_PARTS, parts), SHALLOW


@lru_cache
def may_be_deep(device: torch.device, key_width: int) -> bool:
    """Whether a deep pipeline for keys of so many numbers fits in the device's shared memory."""
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    # HIP's have no such field
    memory = getattr(properties, "shared_memory_per_block_optin", 0)
    return key_width <= MAX_KEY_WIDTH and memory >= DEEP_BYTES


def most_parts(fewest: int, keys: int) -> int:
    """How many a sequence of so many keys is cut into at most: a power of two."""
    wanted = triton.next_power_of_2(triton.cdiv(keys, LONG))
    return max(fewest, min(MAX_PARTS, MORE_PARTS * fewest, wanted))


def scales(dim: int, cap: float) -> tuple[float, float]:
    """(scale, bend): scores of base 2 are scale · product, or scale · tanh(bend · product) with a cap."""
    if cap:
        return cap * math.log2(math.e), 1 / (cap * math.sqrt(dim))
    return math.log2(math.e) / math.sqrt(dim), 0.0


def decode_rows(q_DNH: Tensor, data: Tensor, keys: Keys, seen: Seen) -> Tensor:
    """out [D, N, H] of a query per sequence over its keys, at least one.

    `data` is a layer of the cache, [pages, P, J, H]. A sequence's numbers depend on how many the
    others are, not on their lengths.
    """
    tables_DW, lengths_D = keys
    window, cap = seen
    rows, heads, dim = q_DNH.shape
    kv_heads = data.shape[2] // 2
    group = heads // kv_heads
    together = heads_together(kv_heads, group, dim)
    deep = may_be_deep(data.device, together * dim)
    fewest, pipeline = reading(rows * kv_heads // together, deep)
    most = tables_DW.shape[1] * data.shape[1]
    parts = most_parts(fewest, min(most, window) if window else most)
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
        out,
        found,
        lse,
        *scales(dim, cap),
        window,
        HEADS=heads,
        GROUP=group,
        TOGETHER=together,
        QUERIES=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        PAGE=data.shape[1],
        FEWEST=fewest,
        PARTS=parts,
        LONG=LONG,
        CAP=cap > 0,
        WINDOW=window > 0,
        num_warps=pipeline.warps,
        num_stages=pipeline.stages,
    )
    if parts > 1:
        _joined_kernel[(rows * heads,)](
            found,
            lse,
            lengths_D,
            out,
            window,
            HEADS=heads,
            DIM=dim,
            FEWEST=fewest,
            PARTS=parts,
            LONG=LONG,
            WINDOW=window > 0,
            num_warps=1,
        )
    return out
