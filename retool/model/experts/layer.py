"""An expert layer where a dense block has its gated MLP: what families with experts share.

Legend: t tokens of this rank · D model · F an expert's ffn · X experts · k experts of a token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from retool.batch import PackedBatch
from retool.model.block import Execution, PerToken, new_parameter
from retool.model.config import ModelConfig
from retool.model.experts.products import experts_mlp
from retool.model.experts.routing import chosen_experts, probabilities, weights_of
from retool.model.experts.travel import travelling_mlp
from retool.model.hf.names import Stored

ROUTER = Stored("mlp.gate.weight", "router")
FUSED = [("mlp.experts.gate_up_proj", "gate_up"), ("mlp.experts.down_proj", "down")]
DIVIDED = ["gate_up", "down"]


class WithExperts(Protocol):
    """What is used here of a block: its own parameters, and how it runs."""

    config: ModelConfig
    execution: Execution
    index: int
    after_is_local: bool
    router: nn.Parameter
    gate_up: nn.Parameter
    down: nn.Parameter


def add_experts(block: WithExperts) -> None:
    """Give the block its router [X, D] and its experts' matrices [X, 2·F, D] and [X, D, F].

    Where ranks divide the experts, it has a part of the matrices.
    """
    sizes = block.config.experts
    assert sizes is not None
    hidden = block.config.hidden
    ranks = block.execution.mesh.ep
    own = sizes.count // ranks
    block.after_is_local = ranks == 1
    block.gate_up = new_parameter(own, 2 * sizes.width, hidden)
    block.down = new_parameter(own, hidden, sizes.width)
    block.router = new_parameter(sizes.count, hidden)


def experts_of(
    batch: PackedBatch,
    layer: int,
) -> PerToken:
    """What `mixture` takes of each token: whether it is real, and experts that are given for it."""
    given = None if batch.experts is None else batch.experts[:, layer]
    return batch.real, given


def mixture(
    block: WithExperts,
    normed_tD: torch.Tensor,
    real_t: torch.Tensor | None = None,
    given_tk: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token through its experts: [t, D] → [t, D].

    The router chooses them, unless they are given (`routing.chosen_experts`).
    """
    sizes = block.config.experts
    assert sizes is not None
    probs_tX = probabilities(normed_tD, block.router)
    experts_tk = chosen_experts(probs_tX, sizes, given_tk)
    watch = block.execution.watch
    if watch is not None:
        probs_tX = watch.seen(block.index, probs_tX, experts_tk, real_t)
    weights_tk = weights_of(probs_tX, experts_tk, sizes)
    group = block.execution.mesh.ep_group
    routed = (normed_tD, experts_tk, weights_tk, block.gate_up, block.down)
    return experts_mlp(*routed) if group is None else travelling_mlp(*routed, group)


def stored_experts(config: ModelConfig) -> list[Stored]:
    """The three matrices of each expert, by their own names."""
    sizes = config.experts
    assert sizes is not None
    names = list[Stored]()
    for number in range(sizes.count):
        expert = f"mlp.experts.{number}."
        names += [
            Stored(f"{expert}gate_proj.weight", "gate_up", sizes.width),
            Stored(f"{expert}up_proj.weight", "gate_up", sizes.width),
            Stored(f"{expert}down_proj.weight", "down", config.hidden),
        ]
    return names
