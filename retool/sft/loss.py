"""The SFT loss: −log p of every trained token, summed. The caller divides by the global number of
trained tokens.

t tokens of this sequence-parallel rank · D model · V vocab.
"""

from __future__ import annotations

import torch

from retool.batch import PackedBatch, to_device
from retool.model.block import Execution
from retool.model.logprobs import sum_logit_bytes, weighted_logprob_sum
from retool.model.recompute import Recompute
from retool.parallel.fsdp import Sharded

MIN_SHARE_TO_SCORE_ALL = (
    0.9  # from this share of trained tokens on, choosing them costs more than the head saves
)


def loss_sum(model: Sharded, pack: PackedBatch) -> torch.Tensor:
    """Σ −weight · log p(label) over this rank's slice of a whole pack on the host: a 0-d tensor in
    at least fp32, on the device.

    The vocabulary head sees trained tokens only. They are counted on the host, so nothing waits for
    the device.
    """
    mesh = model.mesh
    part = pack.slice(mesh.sp_rank, mesh.sp)
    trained = part.weights.nonzero()[:, 0]
    if len(trained) == 0:
        # A weight of 0: every rank runs the same graph and collectives
        trained = torch.zeros(1, dtype=torch.int64)
    batch = part.to(mesh.device)
    chosen = None
    if len(trained) < MIN_SHARE_TO_SCORE_ALL * len(part.weights):
        chosen = to_device(trained, mesh.device)

    return sum_over_tokens(model, batch, chosen)


def sum_over_tokens(
    model: Sharded, batch: PackedBatch, chosen: torch.Tensor | None = None
) -> torch.Tensor:
    """`loss_sum` of a rank's slice that is on the device. `chosen` int64 [n]: the tokens that are
    scored; None: all.
    """
    at_once = sum_logit_bytes(model.mesh.device.type, recompute_of(model))

    def score(hidden_tD: torch.Tensor, weight_VD: torch.Tensor, cap: float = 0.0) -> torch.Tensor:
        if chosen is None:
            labels = batch.labels
            return -weighted_logprob_sum(hidden_tD, weight_VD, labels, batch.weights, at_once, cap)
        hidden, labels, weights = (
            x.index_select(0, chosen) for x in (hidden_tD, batch.labels, batch.weights)
        )
        return -weighted_logprob_sum(hidden, weight_VD, labels, weights, at_once, cap)

    return model(batch, score)


def recompute_of(model: Sharded) -> Recompute:
    """What the backward of a decoder, or of transformers' module, computes again."""
    execution = getattr(model.module, "execution", None)
    return execution.recompute if isinstance(execution, Execution) else "none"
