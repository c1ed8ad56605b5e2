"""What the attention layers of a borrowed model call: our varlen attention over packed documents,
with Ulysses' two all-to-alls around it.

transformers looks the function up by its name (`AttentionInterface`). Where a name has no function
for masks, its models make none: documents are told apart by `cu_seqlens`.

Legend: T tokens of the pack · t tokens of this rank · N / K query / kv heads · n this rank's · H
head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch

from retool.batch import PackedBatch
from retool.model.attention.dispatch import attention
from retool.model.attention.pack import pack_of
from retool.parallel.collectives import all_to_all
from retool.parallel.mesh import Mesh
from retool.parallel.ulysses import HeadPlan, join_heads, q_k_v, split_heads

NAME = "retool"  # of our function in transformers' table
HOLDER = "retool_attention"  # attribute of an attention layer: what it calls


class Attention(Protocol):
    """What an attention layer calls: q [1, N, t, H], k and v [1, K, t, H] → [1, t, N, H]."""

    def attend(
        self,
        layer: torch.nn.Module,
        q_1NtH: torch.Tensor,
        k_1KtH: torch.Tensor,
        v_1KtH: torch.Tensor,
        given: dict[str, Any],
    ) -> torch.Tensor: ...


class PackedAttention:
    """Causal attention within the documents of the pack that is being computed.

    Which pack that is, `computing` says; a block that runs again in the backward says it again.
    """

    def __init__(self, mesh: Mesh, backend: str) -> None:
        self.mesh = mesh
        self.backend = backend
        self.pack: PackedBatch | None = None

    @contextmanager
    def computing(self, pack: PackedBatch | None) -> Iterator[None]:
        """Attention called inside is of this pack."""
        before = self.pack
        self.pack = pack
        try:
            yield
        finally:
            self.pack = before

    def attend(
        self,
        layer: torch.nn.Module,
        q_1NtH: torch.Tensor,
        k_1KtH: torch.Tensor,
        v_1KtH: torch.Tensor,
        given: dict[str, Any],
    ) -> torch.Tensor:
        """All heads of this rank's tokens. What `given` may hold, the trial has checked."""
        assert self.pack is not None, "attention outside of the model's forward"
        _, heads, t, width = q_1NtH.shape
        pack = self.pack
        sp, rank, group = self.mesh.sp, self.mesh.sp_rank, self.mesh.sp_group
        if pack.alone:
            sp, rank, group = 1, 0, None
        plan = head_plan(sp, rank, heads, k_1KtH.shape[1], width)
        q_tNH = by_token(q_1NtH)
        # Our kernels divide scores by √H
        scale = (given.get("scaling") or width**-0.5) * math.sqrt(width)
        if not math.isclose(scale, 1.0, rel_tol=1e-6):
            q_tNH = q_tNH * scale
        sent = split_heads(q_tNH, by_token(k_1KtH), by_token(v_1KtH), plan, v_1KtH.dtype)
        received = all_to_all(sent, *plan.to_heads(t), group)
        seen = pack_of(pack, given.get("sliding_window") or 0)
        out_TnH = attention(*q_k_v(received, plan), seen, self.backend)
        back = all_to_all(out_TnH.flatten(), *plan.to_sequence(t), group)
        return join_heads(back, plan)[None]


@lru_cache(maxsize=64)
def head_plan(sp: int, rank: int, heads: int, kv_heads: int, width: int) -> HeadPlan:
    """Layers may have other numbers of heads than their neighbours."""
    return HeadPlan(sp, rank, heads, kv_heads, width)


def by_token(x_1NtH: torch.Tensor) -> torch.Tensor:
    """[1, N, t, H] → [t, N, H]."""
    return x_1NtH[0].transpose(0, 1)


def attend_by_layer(
    layer: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """The function in transformers' table: each layer has what it calls as an attribute."""
    calls: Attention = getattr(layer, HOLDER)
    given["attention_mask"] = attention_mask
    return calls.attend(layer, query, key, value, given), None


def make_known() -> None:
    """Put our function in transformers' table."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend_by_layer)


def let_call(block: torch.nn.Module, calls: Attention) -> None:
    """What the block's attention layer calls from here on."""
    for inside in block.modules():
        setattr(inside, HOLDER, calls)
