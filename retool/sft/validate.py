"""Validation: every row once, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from retool.batch import PackedBatch
from retool.parallel.collectives import sum_over
from retool.parallel.fsdp import Sharded
from retool.sft.loss import loss_sum


@torch.no_grad()
def validate(
    model: Sharded, micro_batches: Iterable[PackedBatch], trained_tokens: int
) -> dict[str, float]:
    """`val/loss` in nats per trained token and `val/perplexity`; `micro_batches` are this rank's,
    as many on every rank.
    """
    mesh = model.mesh
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for batch in micro_batches:
        total += loss_sum(model, batch)
    loss = float(sum_over(total, mesh.world_group)) / max(trained_tokens, 1)
    # exp(700) is about the largest float: a diverged model has a perplexity, not an OverflowError.
    return {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
