"""What the attention layers of a borrowed model ask for, as found in a forward without numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Arguments that are done as asked, or looked at before
DONE = frozenset(
    {
        "attention_mask",
        "is_causal",
        "dropout",
        "scaling",
        "sliding_window",
    }
)
# Arguments that ask for nothing that isn't done, whatever they say
IDLE = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "return_dict",
        "max_length_q",
        "max_length_k",
    }
)


class _Shapes(torch.autograd.Function):
    """Attention's result without numbers; for the backward it keeps what our kernels keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, heads, t, width = q.shape
        out = q.new_empty(1, t, heads, width)
        lse = q.new_empty(heads, t, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        dout: Tensor,
    ) -> tuple[Tensor, ...]:
        del dout
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


@dataclass
class Calls:
    """Attention's calls, each with its sizes and with what is wrong with it."""

    heads: list[int] = field(default_factory=list)
    kv_heads: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def attend(
        self,
        layer: nn.Module,
        q_1NtH: Tensor,
        k_1KtH: Tensor,
        v_1KtH: Tensor,
        given: dict[str, Any],
    ) -> Tensor:
        """Note the call; the result has shapes only."""
        self.heads.append(q_1NtH.shape[1])
        self.kv_heads.append(k_1KtH.shape[1])
        self.widths.append(q_1NtH.shape[-1])
        self.windows.append(given.get("sliding_window") or 0)
        self.faults += _shape_faults(q_1NtH, k_1KtH, v_1KtH)
        self.faults += _not_done(layer, given)
        if self.faults:
            raise ValueError(self.faults[0])
        return _Shapes.apply(q_1NtH, k_1KtH, v_1KtH)


def _shape_faults(q: Tensor, k: Tensor, v: Tensor) -> Iterator[str]:
    """Shapes that our kernels don't take."""
    _, heads, t, width = q.shape
    _, kv_heads, length, key_width = k.shape
    value_width = v.shape[-1]
    if not width == key_width == value_width:
        widths = f"{key_width} and {value_width}"
        yield f"heads of keys and values differ in width ({widths})"
    if k.shape[:3] != v.shape[:3] or length != t:
        yield "queries, keys and values aren't of the same tokens"
    if heads % kv_heads:
        yield f"{heads} query heads aren't a multiple of {kv_heads} kv heads"


def _not_done(layer: nn.Module, given: dict[str, Any]) -> Iterator[str]:
    """What a call asks for that our attention doesn't do."""
    if given.get("attention_mask") is not None:
        yield "its attention has a mask of its own"
    causal = given.get("is_causal")
    if causal is None:
        causal = getattr(layer, "is_causal", True)
    if not causal:
        yield "its attention isn't causal"
    if dropout := given.get("dropout"):
        yield f"its attention has dropout={dropout:g}"
    for name, value in given.items():
        if name in DONE or name in IDLE or value is None:
            continue
        shown = f"={value:g}" if isinstance(value, float) else ""
        yield f"its attention asks for {name}{shown}"
