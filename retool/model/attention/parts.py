"""q, k and v in one buffer, as ranks send and receive them, and their gradients in one as well.

Where they are tensors of their own, autograd copies the three gradients together again in every
layer. A kernel that can write anywhere writes them into the parts of one buffer instead.

Legend: T tokens · n query heads · k key/value heads · j = n + 2·k · H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]  # q [T, n, H], k and v [T, k, H], or what is like them


def apart(heads_TjH: Tensor, kv_heads: int) -> Parts:
    """q, k and v of a joined buffer: views."""
    query_heads = heads_TjH.shape[1] - 2 * kv_heads
    q, k, v = torch.split_with_sizes(heads_TjH, [query_heads, kv_heads, kv_heads], 1)
    return q, k, v


def new_parts(q_TnH: Tensor, k_TkH: Tensor) -> Parts:
    """Memory for their gradients, joined."""
    tokens, query_heads, width = q_TnH.shape
    kv_heads = k_TkH.shape[1]
    return apart(q_TnH.new_empty((tokens, query_heads + 2 * kv_heads, width)), kv_heads)


def together(parts: Parts) -> Tensor:
    """[T, j, H]: the buffer whose parts they are, or a copy."""
    q, k, v = parts
    tokens, query_heads, width = q.shape
    heads = query_heads + 2 * k.shape[1]
    k_begins = q.storage_offset() + query_heads * width
    v_begins = k_begins + k.shape[1] * width
    strides = (heads * width, width, 1)
    same = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    same = same and k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    placed = (k.storage_offset(), v.storage_offset()) == (k_begins, v_begins)
    if same and placed and q.stride() == k.stride() == v.stride() == strides:
        return q.as_strided((tokens, heads, width), strides)
    return torch.cat(parts, 1)
