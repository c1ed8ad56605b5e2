"""AdamW on flat shards, learning-rate schedules, loss scaling, and the global gradient clip:
nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from retool.parallel.fsdp import Layout, Sharded
from retool.parallel.fsdp.overlap import copied, recorded, wait_for

Run = tuple[int, int]  # elements [start, stop) of a rank's shard
# Elements of each offloaded tensor in each of the three chunks that the update has on the device
VISITING = 1 << 24
HALVINGS = 16  # log2 of the first loss scale in float16
GROWTH = 2000  # finite gradients in a row after which the loss scale is doubled


@dataclass(frozen=True)
class AdamWOptions:
    """Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), on every parameter, norms and
    biases too.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    eps: float = 1e-8


class LossScale:
    """Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740, section 3.2): gradients that are
    computed in float16 neither vanish nor overflow. All on the device.

    `value` [] fp32: 2^16 at first, halved by a gradient that isn't finite (not below 1), doubled
    after 2,000 in a row that are. Where `param_dtype` isn't float16 it is 1 and nothing is done.
    `halvings`: how many such gradients it takes down to 1.
    """

    def __init__(self, param_dtype: torch.dtype, device: torch.device) -> None:
        self.halvings = HALVINGS if param_dtype == torch.float16 else 0
        self.value = torch.full((), 2.0**self.halvings, device=device)
        self.finite = torch.zeros((), device=device)  # gradients since it changed

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What to call `backward` of."""
        return loss * self.value if self.halvings else loss

    def update(self, skipped: torch.Tensor) -> None:
        """After a step: `skipped` [] is 1 where its gradient wasn't finite, else 0."""
        if not self.halvings:
            return
        self.finite = (self.finite + 1) * (1 - skipped)
        grown = (self.finite == GROWTH).float()
        self.value = torch.clamp(self.value * 2 ** (grown - skipped), min=1.0)
        self.finite *= 1 - grown

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps of it."""
        return {"loss_scale": [float(self.value), float(self.finite)]} if self.halvings else {}

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's; from the start where it has none."""
        if self.halvings and "loss_scale" in extra:
            value, finite = extra["loss_scale"]
            self.value.fill_(value)
            self.finite.fill_(finite)


class AdamW:
    """AdamW over a `Sharded` module's flat shards.

    `exp_avg` and `exp_avg_sq` have the shape and dtype of `sharded.master`. With `offload_moments`
    they live in pinned host memory, with `offload_master` the master weights too; both visit the
    device chunk by chunk during `step`. The gradients are of `loss_scale.scaled(loss)`.
    """

    def __init__(
        self,
        sharded: Sharded,
        options: AdamWOptions,
        offload_moments: bool = False,
        offload_master: bool = False,
    ) -> None:
        self.sharded = sharded
        self.options = options
        cuda = sharded.mesh.device.type == "cuda"
        self.offload_moments = offload_moments and cuda
        self.offload_master = offload_master and cuda
        if self.offload_master:
            sharded.offload_master()
        where = torch.device("cpu") if self.offload_moments else sharded.mesh.device
        self.exp_avg, self.exp_avg_sq = (
            torch.zeros(
                sharded.master.shape,
                dtype=sharded.master.dtype,
                device=where,
                pin_memory=self.offload_moments,
            )
            for _ in range(2)
        )
        self.steps = torch.zeros((), dtype=torch.float32, device=sharded.mesh.device)
        self.trainable = trainable_runs(sharded.layout, sharded.mesh.shard_rank)
        self.loss_scale = LossScale(sharded.param_dtype, sharded.mesh.device)

    def step(self, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, update and refresh the gathered copy.

        Returns (gradient norm before clipping, 1.0 if it wasn't finite).

        Both stay on the device. A non-finite norm leaves weights, moments and the step count as
        they were. A parameter that no gradient reached has one of zero: it decays. ValueError for
        one that was frozen, or freed, after sharding.
        """
        sharded = self.sharded
        sharded.finish_gradients()
        self._check_trainable()
        norm = sharded.grad_norm() / self.loss_scale.value
        skipped = (~torch.isfinite(norm)).float()
        limit = self.options.clip_grad
        scale = torch.clamp((norm + 1e-6) / limit, min=1.0) if limit > 0 else torch.ones_like(norm)
        scale = scale * self.loss_scale.value
        if sharded.master.dtype == torch.float64:  # the fused kernel takes a scale in fp32 only
            sharded.grad.div_(scale)
            scale = torch.ones_like(norm)
        scale = scale.float()
        offloaded = self.offload_moments or self.offload_master
        if offloaded:
            self._offloaded_update(lr, scale, skipped)
        else:
            self._update(
                self.trainable,
                sharded.master,
                sharded.grad,
                self.exp_avg,
                self.exp_avg_sq,
                lr,
                scale,
                skipped,
            )
        self.steps += 1 - skipped
        self.loss_scale.update(skipped)
        sharded.refresh(copied=offloaded)
        return norm, skipped

    def _check_trainable(self) -> None:
        for unit in self.sharded.units:
            for slot, parameter in zip(unit.layout.slots, unit.parameters, strict=True):
                if parameter.requires_grad != slot.trainable:
                    done = "frozen" if slot.trainable else "made trainable"
                    raise ValueError(
                        f"parameter {slot.name} was {done} after sharding, and the update doesn't "
                        "know: do it before `shard`."
                    )

    def _update(
        self,
        runs: list[Run],
        master: torch.Tensor,
        grad: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        lr: float,
        scale: torch.Tensor,
        skipped: torch.Tensor,
    ) -> None:
        """One fused kernel over `runs`; the gradient is divided by `scale` in it, and left alone
        where `skipped`.
        """
        if not runs:
            return
        parts = [[t[a:b] for a, b in runs] for t in (master, grad.to(master.dtype), first, second)]
        steps = [self.steps.clone() for _ in runs]
        for step in steps:
            step += 1
        torch.ops.aten._fused_adamw_(
            *parts,
            [],
            steps,
            lr=lr,
            beta1=self.options.betas[0],
            beta2=self.options.betas[1],
            weight_decay=self.options.weight_decay,
            eps=self.options.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=skipped,
        )

    def _offloaded_update(self, lr: float, scale: torch.Tensor, skipped: torch.Tensor) -> None:
        """Chunk by chunk through three slots of device memory, each way in a stream of its own;
        chunk i takes slot i mod 3.

        gather stream   | 0 ↓ | 1 ↓ | 2 ↓ | 3 ↓ | …     from pinned memory, once the slot's last chunk has left
        compute               | 0   | 1   | 2   | …
        reduce stream               | 0 ↑ | 1 ↑ | …
        """
        sharded = self.sharded
        device = self.sharded.mesh.device
        arriving = sharded.overlap.gather_stream
        leaving = sharded.overlap.reduce_stream
        flats = (sharded.master, self.exp_avg, self.exp_avg_sq)
        away = (self.offload_master, self.offload_moments, self.offload_moments)
        numel = sharded.layout.shard_numel
        slots = [
            [
                torch.empty(min(VISITING, numel), dtype=t.dtype, device=device) if o else t
                for t, o in zip(flats, away, strict=True)
            ]
            for _ in range(3)
        ]
        free: list[torch.cuda.Event | None] = [recorded() if arriving is not None else None] * 3
        for number, start in enumerate(range(0, numel, VISITING)):
            part = slice(start, min(start + VISITING, numel))
            slot = number % 3
            here = [
                s[: part.stop - start] if o else s[part]
                for s, o in zip(slots[slot], away, strict=True)
            ]
            visitors = [(h, t[part]) for h, t, o in zip(here, flats, away, strict=True) if o]
            wait_for(copied(arriving, visitors, free[slot]))
            runs = [(max(a, start) - start, min(b, part.stop) - start) for a, b in self.trainable]
            self._update(
                [r for r in runs if r[0] < r[1]],
                here[0],
                sharded.grad[part],
                here[1],
                here[2],
                lr,
                scale,
                skipped,
            )
            if sharded.compute is not sharded.master:
                sharded.compute[part].copy_(here[0])
            free[slot] = copied(
                leaving, [(t, h) for h, t in visitors], None if leaving is None else recorded()
            )
        for event in free:
            wait_for(event)


def trainable_runs(layout: Layout, shard_rank: int) -> list[Run]:
    """Stretches of a rank's shard to update: one for everything, unless some parameters are frozen.

    Padding is zero and stays so.
    """
    runs: list[Run] = []
    for unit in layout.units:
        low = shard_rank * unit.shard_numel
        edges = [(s.offset, s.trainable) for s in unit.slots] + [(unit.numel, True)]
        for (start, trainable), (stop, _) in pairwise(edges):
            a = max(start, low) - low + unit.start
            b = min(stop, low + unit.shard_numel) - low + unit.start
            if not trainable or a >= b:
                continue
            if runs and runs[-1][1] == a:
                runs[-1] = (runs[-1][0], b)
            else:
                runs.append((a, b))
    return runs


def learning_rate(
    step: int,
    total: int,
    peak: float,
    kind: str = "cosine",
    warmup_ratio: float = 0.1,
    min_ratio: float = 0.0,
) -> float:
    """Learning rate of step `step` (from 0) of `total`: peak·(s+1)/warmup, then the schedule down
    to `peak·min_ratio`.

    cosine: half a period; wsd: constant, then linear over the last tenth (Hu et al., arXiv
    2404.06395); constant.
    """
    warmup = int(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    after = step - warmup
    length = max(total - warmup, 1)
    progress = min(after / length, 1.0)
    if kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif kind == "wsd":
        decay = max(int(total * 0.1), 1)
        shape = min(1.0, max(total - step, 0) / decay)
    elif kind == "constant":
        return peak
    else:
        raise ValueError(f"optim.lr_scheduler={kind!r} is unknown. Use cosine, wsd or constant.")
    return peak * (min_ratio + (1 - min_ratio) * shape)
