"""Attention of new tokens over the paged KV cache, after their own keys and values were written to
it.

    decode items    one new token each: batched over a padded page table
    chunk items     several new tokens: the last `count` positions of their sequence, causal among
                    themselves

    triton   ours (`attention_triton.py`, `chunks_triton.py`): on an H100 as fast as the next or faster in every shape
             that was measured
    flash    FlashAttention-2's paged kernels (flash-attn ≥ 2.5, pages of 256 tokens): where ours
             don't fit, heads of 96 for one
    torch    torch's attention over keys and values gathered by the page table: on the CPU, and in
             fp32 and fp64

Legend: T new tokens · S items · D decode items · W pages of the longest sequence · P tokens of a
page · N query heads · K kv heads · J = 2K, keys before values · G query heads per kv head · H head
dim · L tokens of a sequence.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from retool.engine.kernels.kv_cache import KVCache
from retool.engine.kernels.pages import ALL, Pages, Seen
from retool.model.attention.dispatch import TRUSTED, tried

# Of a chunk, in torch's attention: the mask has as many bytes as they have keys, per query head
MAX_QUERIES_AT_ONCE = 512
MAX_GATHERED_BYTES = 1 << 29  # of keys and values, in torch's attention of single tokens
# cuDNN, torch's choice on Hopper, compiles a plan for every shape
ON_GPU = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


TRIED = Seen(window=50, cap=2.0)  # with which kernels are tried
NOT_ASKED = "flash-attn's paged kernels aren't asked for windows and caps"


def choose_paged(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    *,
    windowed: bool = False,
    capped: bool = False,
) -> str:
    """The first of `KERNELS` that take these inputs and compute rightly on this device.

    `windowed`, `capped`: for a model with windows, or with a cap of scores. flash-attn's kernels
    aren't asked for them.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "torch"
    special = windowed or capped
    candidates = {
        "triton": _ours(head_dim, page_size),
        "flash": _flash(head_dim, page_size) and not special,
    }
    for name, takes_this in candidates.items():
        if not takes_this:
            continue
        error = paged_error(name, device, dtype, head_dim, page_size)
        if error <= TRUSTED and special:
            error = paged_error(name, device, dtype, head_dim, page_size, TRIED)
        if error <= TRUSTED:
            return name
        wrong = (
            f"the paged kernels {name!r} compute wrongly on this device with heads of {head_dim} "
            f"(relative error {error:.2g})"
        )
        warnings.warn(f"{wrong}: the next ones are used, which are slower.", stacklevel=2)
    if special:
        what = "has sliding windows" if windowed else "caps attention's scores"
        warnings.warn(f"the model {what}: torch's attention samples, slower.", stacklevel=2)
    return "torch"


def _flash(head_dim: int, page_size: int) -> bool:
    """Whether flash-attn is there and takes this."""
    fits = head_dim % 8 == 0 and head_dim <= 256 and page_size % 256 == 0
    return fits and find_spec("flash_attn") is not None


def _ours(head_dim: int, page_size: int) -> bool:
    """Whether our own kernels take this."""
    if find_spec("triton") is None:
        return False
    from retool.engine.kernels.attention_triton import fits

    return fits(head_dim, page_size)


@lru_cache
def paged_error(
    kernels: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    page_size: int,
    seen: Seen = ALL,
) -> float:
    """Relative error (L2, root mean square over query heads) of paged kernels on a small step of
    random numbers, against torch's attention in fp32: about 0.005 in bf16; infinite where they
    don't run at all (a build for another torch or GPU).
    """
    shape = (1, page_size, 2, head_dim)
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(shape, 6, dtype, device)
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    exact = KVCache(shape, 6, torch.float32, device)
    exact.data.copy_(cache.data)
    # Two decode items, and a chunk
    lengths = (1, page_size + 44, page_size + 30)
    count = 40
    query = torch.randn(2 + count, 4, head_dim, generator=generator).to(device, dtype)
    on_device = partial(torch.tensor, dtype=torch.int32, device=device)
    pages = Pages(
        slots=torch.zeros(1, dtype=torch.int64, device=device),
        tables=on_device([[1, 0], [4, 2], [5, 3]]),
        lengths=on_device(lengths),
        decode=2,
        offsets=on_device([0, count]),
        key_offsets=on_device([0, lengths[2]]),
        counts=(count,),
        host_lengths=lengths[2:],
    )
    out = tried(
        lambda: paged_attention(query, cache, 0, pages, kernels, seen).float(),
        f"the paged kernels {kernels!r} fail here",
    )
    if out is None:
        return math.inf
    wanted = paged_attention(query.float(), exact, 0, pages, "torch", seen)
    # Each counts alike: those of few keys are much larger numbers
    errors = (out - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(errors.square().mean().sqrt())


def paged_attention(
    q_TNH: Tensor, cache: KVCache, layer: int, pages: Pages, kernels: str, seen: Seen = ALL
) -> Tensor:
    """out [T, N, H] by one of `KERNELS`.

    Query head n reads kv head n // G; scores are scaled by 1/sqrt(H).
    """
    chunk, decode = KERNELS[kernels]
    data = cache.data[layer]
    if not pages.counts:
        return decode(q_TNH, data, pages, seen)
    if pages.decode == 0:
        return chunk(q_TNH, data, pages, seen)
    of_decode = decode(q_TNH[: pages.decode], data, pages, seen)
    of_chunks = chunk(q_TNH[pages.decode :], data, pages, seen)
    return torch.cat([of_decode, of_chunks])


# ── fused


def _flash_decode(q_DNH: Tensor, data: Tensor, pages: Pages, seen: Seen) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    assert seen == ALL, NOT_ASKED
    keys, values = data.chunk(2, 2)
    tables, lengths = pages.of_decode()
    # By itself it splits long sequences by what else is in the batch
    splits = 1 if pages.each_alone else 0
    out = flash_attn_with_kvcache(
        q_DNH[:, None],
        keys,
        values,
        cache_seqlens=lengths,
        block_table=tables,
        causal=True,
        num_splits=splits,
    )
    return out[:, 0]  # pyright: ignore[reportIndexIssue]


def _flash_chunks(q_TNH: Tensor, data: Tensor, pages: Pages, seen: Seen) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    assert seen == ALL, NOT_ASKED
    keys, values = data.chunk(2, 2)
    longest = max(pages.host_lengths)
    return flash_attn_varlen_func(  # pyright: ignore[reportReturnType]
        q_TNH,
        keys,
        values,
        pages.offsets,
        pages.key_offsets,
        max(pages.counts),
        longest,
        causal=True,
        block_table=pages.of_chunks().tables,
    )


def _triton_decode(q_DNH: Tensor, data: Tensor, pages: Pages, seen: Seen) -> Tensor:
    from retool.engine.kernels.attention_triton import decode_rows

    return decode_rows(q_DNH, data, pages.of_decode(), seen)


def _triton_chunks(q_TNH: Tensor, data: Tensor, pages: Pages, seen: Seen) -> Tensor:
    from retool.engine.kernels.chunks_triton import Chunks, chunk_rows

    assert pages.offsets is not None
    chunks = Chunks(pages.of_chunks(), pages.offsets, max(pages.counts))
    return chunk_rows(q_TNH, data, chunks, seen)


# ── torch


def _attend(q_SCNH: Tensor, kv_SLJH: Tensor, lengths_S: Tensor, seen: Seen) -> Tensor:
    """Queries are the last C positions of each sequence, of which only the first `lengths` keys
    exist; each sees `seen.window` of them (0: all before it). → [S, C, N, H]

    A kv head's query heads are put behind each other as R = G·C queries, so that no key is copied.
    """
    count = q_SCNH.shape[1]
    heads = kv_SLJH.shape[2] // 2
    length = kv_SLJH.shape[1]
    groups = q_SCNH.shape[2] // heads
    device = q_SCNH.device
    keys, values = kv_SLJH.transpose(1, 2).split(heads, 1)
    q_SKRH = q_SCNH.unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    last = lengths_S[:, None] - count + torch.arange(count, device=device)
    keys_L = torch.arange(length, device=device)
    last_S1R1 = last.repeat(1, groups)[:, None, :, None]
    mask = keys_L <= last_S1R1
    if seen.window:
        mask &= keys_L > last_S1R1 - seen.window
    if seen.cap:
        out = _with_cap(q_SKRH, keys, values, mask, seen.cap)
    else:
        with sdpa_kernel(ON_GPU) if q_SKRH.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(q_SKRH, keys, values, attn_mask=mask)
    return out.unflatten(2, (groups, count)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _with_cap(q_SKRH: Tensor, keys: Tensor, values: Tensor, mask: Tensor, cap: float) -> Tensor:
    """torch's attention has no caps: the formula, with scores in at least fp32."""
    wide = torch.promote_types(q_SKRH.dtype, torch.float32)
    scale = q_SKRH.shape[-1] ** -0.5
    scores = q_SKRH.to(wide) @ keys.to(wide).transpose(-1, -2) * scale
    scores.div_(cap).tanh_().mul_(cap).masked_fill_(~mask, float("-inf"))
    return (scores.softmax(-1) @ values.to(wide)).to(q_SKRH.dtype)


def _gathered(data: Tensor, tables_SW: Tensor) -> Tensor:
    """[S, W·P, 2k, H] of pages [pages, P, 2k, H]."""
    return data.index_select(0, tables_SW.flatten()).view(len(tables_SW), -1, *data.shape[2:])


def _torch_decode(q_DNH: Tensor, data: Tensor, pages: Pages, seen: Seen) -> Tensor:
    if pages.each_alone and pages.host_lengths:
        return _torch_decode_alone(q_DNH, data, pages, seen)
    tables, lengths = pages.of_decode()
    rows = max(1, MAX_GATHERED_BYTES // (tables.shape[1] * data[0].nbytes))
    parts = zip(q_DNH.split(rows), tables.split(rows), lengths.split(rows), strict=True)
    outs = [_attend(q[:, None], _gathered(data, table), length, seen) for q, table, length in parts]
    return torch.cat([out[:, 0] for out in outs])


def _torch_decode_alone(q_DNH: Tensor, data: Tensor, pages: Pages, seen: Seen) -> Tensor:
    """Item after item, each over its own keys and no more."""
    rows = []
    for i, length in enumerate(pages.host_lengths):
        item = slice(i, i + 1)
        used = -(-length // data.shape[1])
        kv = _gathered(data, pages.tables[item, :used])[:, :length]
        rows.append(_attend(q_DNH[item, None], kv, pages.lengths[item], seen)[:, 0])
    return torch.cat(rows)


def _torch_chunks(q_TNH: Tensor, data: Tensor, pages: Pages, seen: Seen) -> Tensor:
    rows = []
    start = 0
    for i, (count, length) in enumerate(zip(pages.counts, pages.host_lengths, strict=True)):
        item = pages.decode + i
        table = pages.tables[item : item + 1, : -(-length // data.shape[1])]
        kv = _gathered(data, table)
        for low in range(0, count, MAX_QUERIES_AT_ONCE):
            high = min(low + MAX_QUERIES_AT_ONCE, count)
            last = length - count + high
            # What the first of these queries doesn't see, none of them does
            first = max(0, last - (high - low) - seen.window + 1) if seen.window else 0
            queries = q_TNH[None, start + low : start + high]
            lengths = torch.full((1,), last - first, device=q_TNH.device)
            rows.append(_attend(queries, kv[:, first:last], lengths, seen)[0])
        start += count
    return torch.cat(rows)


# (queries, a layer of the cache, pages, seen) → like the queries
Kernel = Callable[[Tensor, Tensor, Pages, Seen], Tensor]
KERNELS: dict[str, tuple[Kernel, Kernel]] = {  # for chunks, for single tokens
    "triton": (_triton_chunks, _triton_decode),
    "flash": (_flash_chunks, _flash_decode),
    "torch": (_torch_chunks, _torch_decode),
}
