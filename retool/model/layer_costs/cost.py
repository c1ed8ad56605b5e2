"""What one layer costs: its matrices, and the tensors of its forward and backward, each by name.

A family's `costs` gives a `LayerCosts`. Whoever plans memory or counts FLOPs only adds up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from retool.model.recompute import Recompute

# In which dtype a tensor is: the weights', the residual stream's, one that sums are kept in (at
# least fp32), or fp32. Or it is a copy of the residual stream in the dtype of sums, or in the
# weights', where that is another.
Kind = Literal["compute", "residual", "sums", "fp32", "widened", "narrowed"]


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
            "widened": self.sums if self.residual != self.sums else 0,
            "narrowed": self.compute if self.residual != self.compute else 0,
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
class Uncompiled:
    """What an uncompiled block keeps besides: of what is before attention, and of what is after.

    Every operation keeps its own: a norm its input in the dtype of sums and its result before the
    weight, a gated MLP both factors of its product and the product. What the compiled block keeps and
    this one doesn't is taken off.
    """

    before: tuple[Cost, ...] = ()
    after: tuple[Cost, ...] = ()


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
    `uncompiled`: see `as_uncompiled`.
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
    uncompiled: Uncompiled = Uncompiled()

    def as_uncompiled(self) -> LayerCosts:
        """What the block costs where it isn't compiled.

        `gradients` stays: freed step by step, those of an uncompiled block need a little less.
        """
        before = self.uncompiled.before
        after = self.uncompiled.after
        kept = dict(self.kept)
        kept["none"] = (*kept["none"], *before, *after)
        if "selective" in kept:
            kept["selective"] = (*kept["selective"], *before)
        chunked = replace(
            self.chunked,
            throughout=(*self.chunked.throughout, *before),
            mlp=(*self.chunked.mlp, *after),
        )
        return replace(self, kept=kept, chunked=chunked)

    @property
    def parameters(self) -> int:
        """Elements of all matrices."""
        return sum(matrix.elements for matrix in (*self.before, *self.after))

    @property
    def active_parameters(self) -> int:
        """Elements of the matrices that a token is multiplied with."""
        return self.parameters - self.unused
