"""One optimizer step, and what it measured, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from retool.batch import PackedBatch
from retool.model.decoder import balance_of
from retool.model.experts.balance import NUMBERS, counted
from retool.optim import AdamW, LossScale
from retool.parallel.collectives import sum_over
from retool.parallel.fsdp import Sharded
from retool.parallel.streams import start_copy_to_host
from retool.perf import StepTimer
from retool.sft.loss import loss_sum
from retool.sft.recorded import SmallPacks


@dataclass(frozen=True)
class Measured:
    """(loss, gradient norm, 1.0 if the step was skipped), on its way to the host; behind them, of a
    model with experts, `balance.NUMBERS`.
    """

    values: torch.Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, float, bool]:
        """Wait for the values; read one step late, they have long arrived."""
        loss, norm, skipped = self._all()[:3]
        return loss, norm, bool(skipped)

    def read_balance(self) -> dict[str, float]:
        """How the experts were used, by the metric's name; empty without experts."""
        return dict(zip(NUMBERS, self._all()[3:], strict=False))

    def _all(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


def train_step(
    model: Sharded,
    optimizer: AdamW,
    micro_batches: Sequence[PackedBatch],
    trained_tokens: int,
    lr: float,
    timer: StepTimer,
    hold_gradients: bool = False,
    beat: Callable[[], object] | None = None,
    small: SmallPacks | None = None,
) -> Measured:
    """Forward and backward of this rank's micro-batches (whole packs, as many on every rank), clip,
    update.

    `trained_tokens` counts the global batch: the loss is its mean over them, whatever the layout.
    With `hold_gradients` they are reduced once, after the last micro-batch, instead of after each
    (`Sharded.no_sync`). `beat` is called before each: a large batch may take longer than a run may
    be silent. `small` runs those that are short.
    """
    mesh = model.mesh
    balance = balance_of(model)
    model.zero_grad()
    if balance is not None:
        balance.begin(sum(batch.real_tokens for batch in micro_batches))
    # float64: thousands of micro-batches' shares are added, and float32 would depend on how they
    # are cut.
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    # 1: all answers of a batch may have been cut off
    divisor = max(trained_tokens, 1)
    with timer.phase("forward_backward"):
        for number, batch in enumerate(micro_batches, 1):
            if beat is not None:
                beat()
            last = number == len(micro_batches)
            hold = hold_gradients and not last
            held = model.no_sync() if hold else nullcontext()
            with model.last_backward() if last else held:
                if small is not None and small.takes(batch):
                    total += small.run(batch, divisor, optimizer.loss_scale.value, hold)
                else:
                    total += _forward_backward(model, batch, divisor, optimizer.loss_scale)
        model.finish_gradients()
    with timer.phase("optimizer"):
        norm, skipped = optimizer.step(lr)
    # Each rank has summed its own tokens' loss over the global count: the sum of all is the mean.
    sum_over(total, mesh.world_group)
    values = torch.stack([total, norm.double(), skipped.double()])
    return on_its_way(values if balance is None else torch.cat([values, balance.numbers()]))


def _forward_backward(
    model: Sharded, batch: PackedBatch, divisor: int, scale: LossScale
) -> torch.Tensor:
    """This rank's share of the loss, without a history, after its backward.

    Its graph goes with this call: a recording can't use what an earlier graph still holds.
    """
    with counted(balance_of(model), scale.value):
        loss = loss_sum(model, batch) / divisor
    scale.scaled(loss).backward()
    return loss.detach()


def on_its_way(values: torch.Tensor) -> Measured:
    """Start copying a small tensor to the host."""
    if values.device.type != "cuda":
        return Measured(values, None)
    return Measured(*start_copy_to_host(values))
