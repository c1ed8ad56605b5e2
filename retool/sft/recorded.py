"""Micro-batches so short that the host would take longer than the device: recorded once for each of a
few sizes, then one launch each. See [Note: one launch for a micro-batch].

t tokens of this rank, B documents.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from retool.batch import PackedBatch, edges
from retool.data.packing import TOKENS_OF_A_DOCUMENT, recorded_size
from retool.model.decoder import Decoder
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.recording import Record, Recordings
from retool.sft.loss import sum_over_tokens

# Tensors of a pack that a model reads
READ = ("tokens", "labels", "weights", "positions", "real", "cu_seqlens")


class SmallPacks:
    """Forward and backward of packs for which `PackedBatch.room` is at most `most` tokens of a rank."""

    def __init__(self, model: Sharded, most: int, record: Record | None = None) -> None:
        self.model = model
        self.most = most if can_record(model) else 0
        self.recordings = Recordings(model, record)
        # By size, where a recording reads them
        self.batches: dict[int, PackedBatch] = {}
        wide = torch.promote_types(model.param_dtype, torch.float32)
        self.count = torch.ones((), dtype=wide, device=model.mesh.device)
        self.scale = torch.ones((), device=model.mesh.device)

    def takes(self, pack: PackedBatch) -> bool:
        return 0 < pack.room <= self.most

    def close(self) -> None:
        """Forget what was recorded; whoever still holds this holds no graph."""
        self.recordings.made.clear()

    def run(
        self, pack: PackedBatch, trained_tokens: int, scale: torch.Tensor, held: bool
    ) -> torch.Tensor:
        """The loss, a 0-d tensor until the next call: this rank's sum over `trained_tokens`.

        Its gradient is `scale` times as large. `held`: inside `Sharded.no_sync`.
        """
        mesh = self.model.mesh
        size = recorded_size(pack.room)
        part = widened(pack.slice(mesh.sp_rank, mesh.sp), size)
        if size not in self.batches:
            self.batches[size] = part.to(mesh.device)
        batch = self.batches[size]
        for name in READ:
            source = getattr(part, name)
            if mesh.device.type == "cuda":
                # From pageable memory the copy would wait for the device
                source = source.pin_memory()
            getattr(batch, name).copy_(source, non_blocking=True)
        self.count.fill_(trained_tokens)
        self.scale.copy_(scale)

        def work() -> torch.Tensor:
            loss = sum_over_tokens(self.model, batch) / self.count
            (loss * self.scale).backward()
            return loss.detach()

        return self.recordings.run((size, held), work)


def can_record(model: Sharded) -> bool:
    """Whether the host decides nothing in a forward and backward but by the pack's size.

    Experts' all-to-alls have sizes of their own, and what goes to host memory is waited for there. Some
    ropes depend on the documents' lengths, and attention's plain formula goes through them.
    """
    module = model.module
    if not isinstance(module, Decoder) or model.mesh.replica_group is not None:
        return False
    config = module.config
    execution = module.execution
    by_length = config.steady_length or execution.backend == "reference"
    return config.experts is None and not by_length and execution.recompute != "offload"


def widened(part: PackedBatch, t: int) -> PackedBatch:
    """A rank's own documents, and one of padding: t tokens. What the host knows of documents is that
    they are as many as may be, and as long.
    """
    spare = t - len(part.tokens)
    cu_seqlens = torch.full((t // TOKENS_OF_A_DOCUMENT + 1,), t, dtype=torch.int32)
    # Behind the padding there are documents without tokens
    cu_seqlens[: len(part.seqlens) + 1] = edges(part.seqlens)

    def more(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_zeros(spare)])

    return replace(
        part,
        tokens=more(part.tokens),
        labels=more(part.labels),
        weights=more(part.weights),
        positions=torch.cat([part.positions, torch.arange(spare)]),
        real=more(part.real),
        cu_seqlens=cu_seqlens,
        seqlens=(t,),
        max_seqlen=t,
    )
