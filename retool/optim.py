"""AdamW on flat shards, learning-rate schedules, loss scaling, and the global gradient clip:
nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from retool.parallel.fsdp import Layout, Sharded
from retool.parallel.streams import record_event, start_copies, wait_for

Stretch = tuple[int, int]  # elements [start, stop) of a rank's shard
# Elements of each offloaded tensor in each of the three chunks that the update has on the device
OFFLOAD_CHUNK_NUMEL = 1 << 24
FIRST_LOSS_SCALE_LOG2 = 16  # in float16: so many halvings take it down to 1
FINITE_STEPS_TO_DOUBLE = 2000  # finite gradients in a row after which the loss scale is doubled


@dataclass(frozen=True)
class AdamWOptions:
    """Decoupled weight decay on every parameter, norms and biases too.

    Loshchilov & Hutter, arXiv 1711.05101.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    eps: float = 1e-8


class LossScale:
    """Dynamic loss scaling: gradients computed in float16 neither vanish nor overflow.

    Micikevicius et al., arXiv 1710.03740, section 3.2. All on the device. `value` [] fp32: 2^16 at
    first, halved by a gradient that isn't finite (not below 1), doubled after 2,000 in a row that
    are. Where `param_dtype` isn't float16 it is 1 and nothing is done. `halvings`: how many such
    gradients it takes down to 1.
    """

    def __init__(self, param_dtype: torch.dtype, device: torch.device) -> None:
        self.halvings = FIRST_LOSS_SCALE_LOG2 if param_dtype == torch.float16 else 0
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
        grown = (self.finite == FINITE_STEPS_TO_DOUBLE).float()
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


class Update(NamedTuple):
    """What one step does everywhere alike. The tensors are [] fp32, on the device.

    The gradient is divided by `scale`; where `skipped` is 1 everything stays as it is.
    """

    lr: float
    scale: torch.Tensor
    skipped: torch.Tensor


class Chunk(NamedTuple):
    """The same elements of the four flat tensors, on the device."""

    master: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


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
        self.exp_avg = self._zeros()
        self.exp_avg_sq = self._zeros()
        self.steps = torch.zeros((), dtype=torch.float32, device=sharded.mesh.device)
        self.trainable = trainable_stretches(sharded.layout, sharded.mesh.shard_rank)
        self.loss_scale = LossScale(sharded.param_dtype, sharded.mesh.device)

    def _zeros(self) -> torch.Tensor:
        """A moment of all master weights, where moments live."""
        master = self.sharded.master
        return torch.zeros(
            master.shape,
            dtype=master.dtype,
            device="cpu" if self.offload_moments else self.sharded.mesh.device,
            pin_memory=self.offload_moments,
        )

    def step(self, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, update and refresh the gathered copy.

        Returns (gradient norm before clipping, 1.0 if it wasn't finite). Both stay on the device. A
        non-finite norm leaves weights, moments and the step count as they were. A parameter that no
        gradient reached has one of zero: it decays. ValueError for one that was frozen, or freed,
        after sharding.
        """
        sharded = self.sharded
        sharded.finish_gradients()
        self._check_trainable()
        norm = sharded.grad_norm() / self.loss_scale.value
        skipped = (~torch.isfinite(norm)).float()
        update = Update(lr, self._gradient_scale(norm), skipped)
        offloaded = self.offload_moments or self.offload_master
        if offloaded:
            self._update_offloaded(update)
        else:
            here = Chunk(sharded.master, sharded.grad, self.exp_avg, self.exp_avg_sq)
            self._update(self.trainable, here, update)
        self.steps += 1 - skipped
        self.loss_scale.update(skipped)
        sharded.refresh(copied=offloaded)
        return norm, skipped

    def _gradient_scale(self, norm: torch.Tensor) -> torch.Tensor:
        """What the update divides gradients by: more than their loss scale if they are clipped.

        [] fp32, as the fused kernel takes it; float64 gradients are divided here instead.
        """
        limit = self.options.clip_grad
        # The reciprocal of torch's clip_grad_norm_, with its 1e-6: the kernel divides by what it is
        # given.
        scale = torch.clamp((norm + 1e-6) / limit, min=1.0) if limit > 0 else torch.ones_like(norm)
        scale = scale * self.loss_scale.value
        if self.sharded.master.dtype == torch.float64:
            self.sharded.grad.div_(scale)
            scale = torch.ones_like(norm)
        return scale.float()

    def _check_trainable(self) -> None:
        for unit in self.sharded.units:
            for slot, parameter in zip(unit.slots, unit.parameters, strict=True):
                if parameter.requires_grad != slot.trainable:
                    done = "frozen" if slot.trainable else "made trainable"
                    raise ValueError(
                        f"parameter {slot.name} was {done} after sharding, and the update doesn't "
                        "know: do it before `shard`."
                    )

    def _update(self, stretches: list[Stretch], chunk: Chunk, update: Update) -> None:
        """One fused kernel over `stretches` of the chunk."""
        if not stretches:
            return
        grad = chunk.grad.to(chunk.master.dtype)
        flats = (chunk.master, grad, chunk.exp_avg, chunk.exp_avg_sq)
        parts = [[flat[start:stop] for start, stop in stretches] for flat in flats]
        # The kernel takes the number of this step, one tensor for each of its parameters
        steps = [self.steps.clone() for _ in stretches]
        for step in steps:
            step += 1
        torch.ops.aten._fused_adamw_(
            *parts,
            [],
            steps,
            lr=update.lr,
            beta1=self.options.betas[0],
            beta2=self.options.betas[1],
            weight_decay=self.options.weight_decay,
            eps=self.options.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=update.scale,
            found_inf=update.skipped,
        )

    def _update_offloaded(self, update: Update) -> None:
        """Chunk by chunk through three slots of device memory, each way in a stream of its own.

        Chunk i takes slot i mod 3: while it is computed, chunk i+1 arrives and chunk i-1 leaves.

            gather stream   | 0 ↓ | 1 ↓ | 2 ↓ | 3 ↓ | …   from pinned memory, once the slot's last
            compute               | 0   | 1   | 2   | …   chunk has left
            reduce stream               | 0 ↑ | 1 ↑ | …
        """
        sharded = self.sharded
        arriving = sharded.overlap.gather_stream
        leaving = sharded.overlap.reduce_stream
        on_gpu = arriving is not None
        numel = sharded.layout.shard_numel
        slots = [self._make_slot() for _ in range(3)]
        # When each slot's last chunk has left: the slot may be filled again
        free: list[torch.cuda.Event | None] = [record_event() if on_gpu else None] * 3
        for number, start in enumerate(range(0, numel, OFFLOAD_CHUNK_NUMEL)):
            part = slice(start, min(start + OFFLOAD_CHUNK_NUMEL, numel))
            slot = number % 3
            chunk, away = self._chunk(part, slots[slot])
            wait_for(start_copies(arriving, away, free[slot]))

            stretches = []
            for first, last in self.trainable:
                inside = (max(first, part.start) - start, min(last, part.stop) - start)
                if inside[0] < inside[1]:
                    stretches.append(inside)
            self._update(stretches, chunk, update)
            if sharded.compute is not sharded.master:
                sharded.compute[part].copy_(chunk.master)

            back = [(home, here) for here, home in away]
            updated = record_event() if leaving is not None else None
            free[slot] = start_copies(leaving, back, updated)
        for event in free:
            wait_for(event)

    def _make_slot(self) -> list[torch.Tensor | None]:
        """Device memory for a chunk of the master weights and of both moments; None for what lives
        on the device.
        """
        sharded = self.sharded
        numel = min(OFFLOAD_CHUNK_NUMEL, sharded.layout.shard_numel)
        return [
            torch.empty(numel, dtype=flat.dtype, device=sharded.mesh.device) if offloaded else None
            for flat, offloaded in self._flats()
        ]

    def _flats(self) -> tuple[tuple[torch.Tensor, bool], ...]:
        """Master weights and moments, each with whether it is offloaded."""
        return (
            (self.sharded.master, self.offload_master),
            (self.exp_avg, self.offload_moments),
            (self.exp_avg_sq, self.offload_moments),
        )

    def _chunk(
        self, part: slice, slot: list[torch.Tensor | None]
    ) -> tuple[Chunk, list[tuple[torch.Tensor, torch.Tensor]]]:
        """A part of the shard as the update sees it, and what of it is away: (its place in the slot,
        its home).
        """
        here: list[torch.Tensor] = []
        away: list[tuple[torch.Tensor, torch.Tensor]] = []
        for (flat, _), room in zip(self._flats(), slot, strict=True):
            home = flat[part]
            if room is None:
                here.append(home)
            else:
                here.append(room[: home.numel()])
                away.append((here[-1], home))
        master, exp_avg, exp_avg_sq = here
        return Chunk(master, self.sharded.grad[part], exp_avg, exp_avg_sq), away


def trainable_stretches(layout: Layout, shard_rank: int) -> list[Stretch]:
    """Stretches of a rank's shard to update: one for everything, unless some parameters are frozen.

    Padding is zero and stays so: it needs no stretch to end for it.
    """
    stretches: list[Stretch] = []
    for unit in layout.units:
        low = unit.low(shard_rank)
        high = low + unit.shard_numel
        # Each slot with the padding after it; the end of the unit closes the last one
        edges = [(slot.offset, slot.trainable) for slot in unit.slots] + [(unit.numel, True)]
        for (offset, trainable), (next_offset, _) in pairwise(edges):
            start = max(offset, low) - low + unit.start
            stop = min(next_offset, high) - low + unit.start
            if not trainable or start >= stop:
                continue
            if stretches and stretches[-1][1] == start:
                stretches[-1] = (stretches[-1][0], stop)
            else:
                stretches.append((start, stop))
    return stretches


def learning_rate(
    step: int,
    total: int,
    peak: float,
    kind: str = "cosine",
    warmup_ratio: float = 0.1,
    min_ratio: float = 0.0,
) -> float:
    """Learning rate of step `step` (from 0) of `total`.

    In the first `warmup_ratio` of them peak·(s+1)/warmup, then the schedule down to
    `peak·min_ratio`: cosine is half a period; wsd is constant, then linear over the last tenth, two
    steps at least (Hu et al., arXiv 2404.06395); constant stays at the peak.
    """
    warmup = int(total * warmup_ratio)
    if step < warmup:
        # From 1, not 0: a first step at rate 0 would train nothing.
        return peak * (step + 1) / warmup
    after = step - warmup
    length = max(total - warmup, 1)
    progress = min(after / length, 1.0)
    if kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif kind == "wsd":
        # Two steps at least, as the first of them is at the peak; at most what the warm-up leaves
        decay = min(max(int(total * 0.1), 2), length)
        shape = min(1.0, max(total - step, 0) / decay)
    elif kind == "constant":
        return peak
    else:
        raise ValueError(f"optim.lr_scheduler={kind!r} is unknown. Use cosine, wsd or constant.")
    return peak * (min_ratio + (1 - min_ratio) * shape)
