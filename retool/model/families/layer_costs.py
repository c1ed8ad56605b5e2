"""What one layer costs: its matrices, and the tensors of its forward and backward, each by name.

A family's `costs` gives a `LayerCosts`. Whoever plans memory or counts FLOPs only adds up.

Legend: D model · F ffn · N query heads · K kv heads · H head dim · E = N·H.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from retool.model.config import ModelConfig
from retool.model.recompute import Recompute
from retool.parallel.ulysses import HeadPlan

# In which dtype a tensor is: the weights', the residual stream's, one that sums are kept in (at
# least fp32), or fp32.
Kind = Literal["compute", "residual", "sums", "fp32"]


class Cost(NamedTuple):
    """A tensor: what it is, and its elements (of an activation, per token of this rank)."""

    what: str
    elements: int
    kind: Kind = "compute"


@dataclass(frozen=True)
class ElementBytes:
    """Bytes of an element of each kind."""

    compute: int
    residual: int
    fp32: int = 4

    @property
    def sums(self) -> int:
        return max(self.compute, 4)

    def of(self, costs: Iterable[Cost]) -> int:
        """Bytes of all these tensors together."""
        each: dict[Kind, int] = {
            "compute": self.compute,
            "residual": self.residual,
            "sums": self.sums,
            "fp32": self.fp32,
        }
        return sum(cost.elements * each[cost.kind] for cost in costs)


@dataclass(frozen=True)
class ChunkedBackward:
    """What a block's backward needs of a long pack, whose MLP runs chunk by chunk.

    `throughout` is there all the time (per token of the pack), and with it either `mlp` (per token
    of a chunk) or `attention` (per token of the pack).
    """

    throughout: tuple[Cost, ...]
    mlp: tuple[Cost, ...]
    attention: tuple[Cost, ...]


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs.

    `before` and `after`: the matrices that a token is multiplied with on either side of attention.
    `attention_width`: channels of all query heads, over which attention's two products go.
    `kept`: what the forward keeps for the backward, as the compiled block does. `gradients`: what
    the backward has at once beside that and what it recomputes. `freed_early`: of what it
    recomputes, what is gone before the gradients are there. `unused`: elements of the matrices that
    a token isn't multiplied with, as its experts are others. `divided`: elements that ranks may divide;
    where they do, `travelling` is there in the block's backward besides, if tokens spread evenly.
    """

    before: tuple[Cost, ...]
    after: tuple[Cost, ...]
    attention_width: int
    kept: Mapping[Recompute, tuple[Cost, ...]]
    gradients: tuple[Cost, ...]
    freed_early: tuple[Cost, ...]
    chunked: ChunkedBackward
    unused: int = 0
    divided: int = 0
    travelling: tuple[Cost, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of all matrices."""
        return sum(matrix.elements for matrix in (*self.before, *self.after))

    @property
    def active_parameters(self) -> int:
        """Elements of the matrices that a token is multiplied with."""
        return self.parameters - self.unused


def gated_block_costs(config: ModelConfig, sp: int, more: Sequence[Cost] = ()) -> LayerCosts:
    """A block of attention and a gated MLP with a norm before each, under `sp` sequence ranks.

    `more` is kept besides, where what is before attention isn't recomputed.
    """
    c = config
    plan = HeadPlan(sp, 0, c.heads, c.kv_heads, c.head_dim)
    # A kv head travels to every rank that reads it.
    qkv = sum(plan.widths) * c.head_dim
    returned = c.query_width if sp > 1 else 0

    full = (
        Cost("the block's input", c.hidden, "residual"),
        Cost("attention's result", c.query_width),
        Cost("attention's log-sum-exp", c.heads, "fp32"),
    )
    selective = (
        *full,
        Cost("the input's norm", c.hidden),
        Cost("the first norm's scale", 1, "fp32"),
        Cost("q k v where attention runs", qkv),
        Cost("attention's result, back from its all-to-all", returned),
        *more,
    )
    none = (
        *selective,
        Cost("the sum after attention", c.hidden, "residual"),
        Cost("its norm", c.hidden),
        Cost("the second norm's scale", 1, "fp32"),
        Cost("gate and up", 2 * c.ffn),
        Cost("their product", c.ffn),
    )
    return LayerCosts(
        before=(Cost("q k v", c.hidden * (c.query_width + 2 * c.key_width)),),
        after=(
            Cost("output projection", c.hidden * c.query_width),
            Cost("gate, up and down", 3 * c.hidden * c.ffn),
        ),
        attention_width=c.query_width,
        kept={"none": none, "selective": selective, "full": full, "offload": full},
        gradients=(
            Cost("gradients of gate, up and their product", 3 * c.ffn),
            Cost("gradients of the block's output and input", 2 * c.hidden, "residual"),
        ),
        freed_early=(Cost("the product of gate and up", c.ffn),),
        chunked=_chunked_backward(c, qkv, returned),
    )


def _chunked_backward(c: ModelConfig, qkv: int, returned: int) -> ChunkedBackward:
    # cuDNN makes the gradients of keys and values for each query head, and adds those of a group
    # up at the end.
    ungrouped = 2 * c.query_width if c.heads > c.kv_heads else 0
    return ChunkedBackward(
        throughout=(
            Cost("gradients of the block's output and input", 2 * c.hidden, "residual"),
            Cost("the input's norm", c.hidden),
            Cost("q k v where attention runs", qkv),
            Cost("attention's result, back from its all-to-all", returned),
            Cost("the gradient of attention's result", c.query_width),
        ),
        mlp=(
            Cost("the sum after attention, and its gradient", 2 * c.hidden, "residual"),
            Cost("its norm, and the norm's gradient", 2 * c.hidden),
            Cost("gate, up, their gradients and their product", 5 * c.ffn),
        ),
        attention=(
            Cost("the result's gradient before and after its all-to-all", 2 * returned),
            Cost("gradients of q k v", qkv),
            Cost("the kernel's sum of the queries' gradients", c.query_width, "sums"),
            Cost("gradients of keys and values for each query head", ungrouped),
            Cost("two numbers a head of the kernel", 2 * c.heads, "fp32"),
        ),
    )
