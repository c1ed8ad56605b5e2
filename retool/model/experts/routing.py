"""Which experts compute a token, and with which weights.

Legend: t tokens of this rank · D model · X experts · k experts of a token.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from retool.model.config import Experts


class Watch(Protocol):
    """What looks at every layer's choice."""

    def seen(
        self,
        layer: int,
        probs: Tensor,
        experts: Tensor,
        real: Tensor | None,
    ) -> Tensor:
        """A layer chose `experts` [t, k] by `probs` [t, X]: the probabilities to go on with.

        `real` bool [t]: which tokens aren't padding; None: all.
        """
        ...


def probabilities(
    x_tD: Tensor,
    router_XD: Tensor,
) -> Tensor:
    """[t, X], in at least fp32: softmax over all experts.

    The product is in fp32 too: rounded to bf16, the scores of several experts are often equal, and
    which of them is chosen would be an accident of the kernel. transformers rounds there.
    """
    wide = torch.promote_types(x_tD.dtype, torch.float32)
    return F.linear(x_tD.to(wide), router_XD.to(wide)).softmax(-1)


def chosen_experts(
    probs_tX: Tensor,
    sizes: Experts,
    given_tk: Tensor | None = None,
) -> Tensor:
    """[t, k] int64: the experts of the largest probabilities.

    `given_tk` were chosen before (router replay, arXiv 2510.11370) and are taken as they are. A row
    that begins with -1 has none: it is routed as usual.
    """
    # Which experts has no gradient. How much they count has one: see `weights_of`.
    own_tk = probs_tX.detach().topk(sizes.per_token, -1).indices
    if given_tk is None:
        return own_tk
    given_tk = given_tk.to(own_tk.dtype)
    return torch.where(given_tk[:, :1] < 0, own_tk, given_tk)


def weights_of(
    probs_tX: Tensor,
    experts_tk: Tensor,
    sizes: Experts,
) -> Tensor:
    """[t, k]: what the chosen experts' results are multiplied with."""
    weights_tk = probs_tX.gather(1, experts_tk)
    if not sizes.normalised:
        return weights_tk
    return weights_tk / weights_tk.sum(-1, keepdim=True)
