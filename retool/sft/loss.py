"""The SFT loss: −log p of every trained token, summed; whoever calls divides by the global number of trained tokens.

t tokens of this sequence-parallel rank · D model · V vocab.
"""

from __future__ import annotations

import torch

from retool.batch import PackedBatch
from retool.model.logprobs import weighted_logprob_sum
from retool.parallel.fsdp import Sharded


def loss_sum(model: Sharded, batch: PackedBatch) -> torch.Tensor:
    """Σ −weight · log p(label) over this rank's slice of a pack on its device: a 0-d tensor in at least fp32."""

    def score(hidden_tD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return -weighted_logprob_sum(hidden_tD, weight_VD, batch.labels, batch.weights)

    return model(batch, score)
