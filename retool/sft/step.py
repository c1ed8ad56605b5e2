"""One optimizer step, and what it measured, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from retool.batch import PackedBatch
from retool.optim import AdamW
from retool.parallel.collectives import sum_over
from retool.parallel.fsdp import Sharded
from retool.parallel.streams import start_copy_to_host
from retool.perf import StepTimer
from retool.sft.loss import loss_sum


@dataclass(frozen=True)
class Measured:
    """(loss, gradient norm, 1.0 if the step was skipped), on its way to the host."""

    values: torch.Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, float, bool]:
        """Wait for the values; read one step late, they have long arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, skipped = self.values.tolist()
        return loss, norm, bool(skipped)


def train_step(
    model: Sharded,
    optimizer: AdamW,
    micro_batches: Sequence[PackedBatch],
    trained_tokens: int,
    lr: float,
    timer: StepTimer,
    hold_gradients: bool = False,
    beat: Callable[[], object] | None = None,
) -> Measured:
    """Forward and backward of this rank's micro-batches (whole packs, as many on every rank), clip,
    update.

    `trained_tokens` counts the global batch: the loss is its mean over them, whatever the layout.
    With `hold_gradients` they are reduced once, after the last micro-batch, instead of after each
    (`Sharded.no_sync`). `beat` is called before each: a large batch may take longer than a run may
    be silent.
    """
    mesh = model.mesh
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    with timer.phase("forward_backward"):
        for number, batch in enumerate(micro_batches, 1):
            if beat is not None:
                beat()
            with (
                model.no_sync() if hold_gradients and number < len(micro_batches) else nullcontext()
            ):
                loss = loss_sum(model, batch) / max(trained_tokens, 1)
                optimizer.loss_scale.scaled(loss).backward()
            total += loss.detach()
        model.finish_gradients()
    with timer.phase("optimizer"):
        norm, skipped = optimizer.step(lr)
    sum_over(total, mesh.world_group)
    return on_its_way(torch.stack([total, norm.double(), skipped.double()]))


def on_its_way(values: torch.Tensor) -> Measured:
    """Start copying a small tensor to the host."""
    if values.device.type != "cuda":
        return Measured(values, None)
    return Measured(*start_copy_to_host(values))
