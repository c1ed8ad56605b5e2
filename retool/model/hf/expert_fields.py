"""The fields of a `config.json` that say what experts a model has."""

from __future__ import annotations

import math
from typing import Any

from retool.model.config import Experts
from retool.model.hf.fields import refused, shown, size, switch

FIELDS = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        "output_router_logits",
        "router_aux_loss_coef",
    }
)


def read_experts(
    c: dict[str, Any],
    *,
    count: int,
    per_token: int,
    width: int,
    coefficient: float,
) -> Experts:
    """A layer's experts of `width` channels; the others are transformers' defaults.

    The load-balance loss counts where transformers adds it to its own: with `output_router_logits`.
    """
    names = [name for name in ("num_experts", "num_local_experts") if c.get(name) is not None]
    counts = {size(c, name) for name in names} or {count}
    if len(counts) > 1:
        told = " and ".join(shown(name, c[name]) for name in names)
        raise ValueError(f"{told} contradict each other. Fetch the file again.")
    experts = counts.pop()
    chosen = size(c, "num_experts_per_tok", default=per_token)
    if chosen > experts:
        raise ValueError(
            f"num_experts_per_tok={chosen} is more than the {experts} experts that there are."
        )
    weight = c.get("router_aux_loss_coef", coefficient)
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        problem = "is no number from 0 on. Fetch it again."
        raise ValueError(f"{shown('router_aux_loss_coef', weight)} {problem}")
    return Experts(
        count=experts,
        per_token=chosen,
        width=width,
        normalised=switch(c, "norm_topk_prob"),
        balance_coefficient=float(weight) if switch(c, "output_router_logits") else 0.0,
    )


def require_experts_everywhere(
    c: dict[str, Any],
) -> None:
    """ValueError where some layers have an MLP instead of experts."""
    if c.get("mlp_only_layers"):
        raise ValueError(refused("mlp_only_layers", c["mlp_only_layers"]))
    if c.get("decoder_sparse_step", 1) != 1:
        raise ValueError(refused("decoder_sparse_step", c["decoder_sparse_step"]))
