"""The load-balance loss of a mixture of experts, and what is told of its balance.

    loss = coefficient · X · Σ_e f_e · P_e                 (Fedus et al., arXiv 2101.03961, eq. 4 to 6)

f_e is how many of a token's k choices are expert e, P_e its probability: both means over the real
tokens of the optimizer step's global batch and over all layers, as transformers' loss has them over
its batch. Padding and dummy packs are no tokens.

[Note: how it is differentiated] f has no gradient, so a token's probability of expert e gets the
constant coefficient · X · f_e / (layers · tokens). f is known when the forward of all layers and ranks
is over, and is needed in the backward only: `_Pulled` adds the constant there, and the model needs
no second output. After the forward of each micro-batch f is summed over all ranks; with several
micro-batches in a step it is that of the step so far, as in Qiu et al., arXiv 2501.11873, section 3.
With one it is exact, and the same at every layout. What is *told* is exact at any rate.

Legend: t tokens of this rank · X experts · k experts of a token · L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from retool.model.config import Experts
from retool.parallel.collectives import sum_over
from retool.parallel.mesh import Mesh

# What `Balance.numbers` holds, in order
NUMBERS = (
    "router/balance_loss",
    "router/entropy",
    "router/most_used",
    "router/least_used",
)


class Balance:
    """Counts an optimizer step's choices and pulls the router towards balance.

    A `routing.Watch`. Without a coefficient it only counts.
    """

    def __init__(
        self,
        sizes: Experts,
        layers: int,
        mesh: Mesh,
    ) -> None:
        self.sizes = sizes
        self.mesh = mesh
        shape = (layers, sizes.count)
        # float64 holds whole numbers exactly, and all sums travel as one tensor
        self.counts = torch.zeros(shape, dtype=torch.float64, device=mesh.device)
        self.probs = torch.zeros_like(self.counts)
        self.entropy = torch.zeros_like(self.counts[:, :1])
        self.pull = torch.zeros_like(self.counts[0])
        # Of the step so far and all ranks
        self.all_counts = torch.zeros_like(self.counts)
        self.tokens = torch.ones((), dtype=torch.float64, device=mesh.device)
        self.counting = False

    def begin(
        self,
        tokens: int,
    ) -> None:
        """A step begins; this rank's micro-batches, whole packs, have `tokens` real tokens.

        Collective.
        """
        kept = (
            self.counts,
            self.probs,
            self.entropy,
            self.pull,
            self.all_counts,
        )
        for tensor in kept:
            tensor.zero_()
        # The ranks of an sp group have the same packs: each counts its share, and the sum over all
        # is right.
        self.tokens.fill_(tokens / self.mesh.sp)
        sum_over(self.tokens, self.mesh.world_group)

    @contextmanager
    def forward(
        self,
        scale: Tensor,
    ) -> Iterator[None]:
        """Around a micro-batch's forward, whose loss is multiplied with `scale`. Collective.

        What runs again in the backward is outside, and isn't counted twice.
        """
        before = self.counts.clone()
        self.counting = True
        try:
            yield
        finally:
            self.counting = False
        if self.sizes.balance_coefficient:
            # Only this micro-batch's: what came before has been summed over the ranks already.
            new = self.counts - before
            sum_over(new, self.mesh.world_group)
            self.all_counts += new
            pull = self._pull() * scale
            self.pull.copy_(pull)

    def _pull(self) -> Tensor:
        """[X]: the gradient of the loss by a token's probability in a layer."""
        layers = len(self.counts)
        f = self._choices(self.all_counts)
        slope = self.sizes.balance_coefficient * self.sizes.count
        return slope * f / (layers * self.tokens.clamp(min=1))

    def _choices(
        self,
        counts: Tensor,
    ) -> Tensor:
        """[X]: f of the module's docstring."""
        return self.sizes.per_token * counts.sum(0) / counts.sum().clamp(min=1)

    def seen(
        self,
        layer: int,
        probs: Tensor,
        experts: Tensor,
        real: Tensor | None,
    ) -> Tensor:
        """See `routing.Watch`."""
        weights = probs.new_ones(len(probs)) if real is None else real.to(probs.dtype)
        if self.counting:
            self._count(layer, probs.detach(), experts, weights)
        if not self.sizes.balance_coefficient or not torch.is_grad_enabled():
            return probs
        pulled: Any = _Pulled.apply(probs, weights, self)
        return pulled

    @torch.no_grad()
    def _count(
        self,
        layer: int,
        probs: Tensor,
        experts: Tensor,
        weights: Tensor,
    ) -> None:
        # Padding weighs 0: its choices would count an expert as busy.
        each = weights.double().repeat_interleave(experts.shape[1])
        self.counts[layer].scatter_add_(0, experts.flatten(), each)
        entropy = torch.special.entr(probs).sum(1)
        self.probs[layer] += weights @ probs
        self.entropy[layer] += weights @ entropy

    def numbers(self) -> Tensor:
        """[4] float64, the step's `NUMBERS`, on the device. Collective; ends the step.

        The balance loss, without its coefficient: `per_token` at perfect balance. The mean entropy of a
        token's probabilities, in nats. Of the layers' experts the one that is most used and the one
        that is least used, as multiples of their fair share.
        """
        self.pull.zero_()
        parts = torch.cat([self.counts, self.probs, self.entropy], 1)
        sum_over(parts, self.mesh.world_group)
        experts = self.sizes.count
        counts, probs, entropy = parts.split([experts, experts, 1], 1)
        tokens = probs.sum().clamp(min=1)  # times layers: a token's probabilities add up to 1
        mean_probs = probs.sum(0) / tokens
        loss = experts * self._choices(counts) @ mean_probs
        fair = counts.sum(1, keepdim=True).clamp(min=1) / experts
        share = counts / fair
        mean_entropy = entropy.sum() / tokens
        return torch.stack(
            [
                loss,
                mean_entropy,
                share.max(),
                share.min(),
            ]
        )


def counted(
    balance: Balance | None,
    scale: Tensor,
) -> AbstractContextManager[None]:
    """`Balance.forward`, where there is one."""
    return nullcontext() if balance is None else balance.forward(scale)


class _Pulled(torch.autograd.Function):
    """The probabilities as they are; the backward adds the balance loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        probs_tX: Tensor,
        weights_t: Tensor,
        balance: Balance,
    ) -> Tensor:
        ctx.save_for_backward(weights_t)
        ctx.balance = balance
        return probs_tX.view_as(probs_tX)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_probs: Tensor
    ) -> tuple[Tensor, None, None]:
        (weights_t,) = ctx.saved_tensors
        pull = ctx.balance.pull.to(d_probs.dtype)
        return d_probs + weights_t[:, None] * pull, None, None
