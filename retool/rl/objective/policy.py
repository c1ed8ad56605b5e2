"""The policy on packed batches: log-probabilities of what was sampled, and one optimizer step.

The policy is softmax(logits / temperature) over the whole vocabulary, in training as in sampling.

t tokens of this sequence-parallel rank · T of a whole pack · D model · V vocab.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from retool.batch import PackedBatch, Sample, pack
from retool.data.packing import Budget, plan_step
from retool.model.logprobs import logprobs
from retool.optim import AdamW
from retool.parallel.collectives import gather_objects, sum_over
from retool.parallel.fsdp import Sharded
from retool.rl.objective.batching import RLBatch, unshift
from retool.rl.objective.losses import (
    LOSSES,
    Clip,
    Metrics,
    entropy_sum,
    kl_sum,
    log_ratio,
    sequence_means,
    sequence_sums,
)


@dataclass(frozen=True)
class LossSpec:
    """What the update minimises: policy loss - entropy_coeff · entropy + kl_coef · KL(policy ‖
    reference).
    """

    mode: str = "vanilla"
    clip: Clip = field(default_factory=Clip)
    temperature: float = 1.0
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    use_kl: bool = False
    # the present weights sampled everything and this is their only update: old = logp without
    # gradient
    on_policy: bool = False
    # the present weights sampled everything and old is the sampler's: how far they lie apart is
    # measured
    compared: bool = False

    @property
    def measures(self) -> bool:
        """Whether the update tells the gap between sampler and trainer, and the entropy."""
        return self.on_policy or self.compared


def chosen_positions(part: PackedBatch) -> Tensor:
    """int64: positions of a rank's slice whose label was sampled; one of weight 0 where there is
    none, so that every rank runs the same graph and collectives. On the host.
    """
    found = part.weights.nonzero()[:, 0]
    return found if len(found) else torch.zeros(1, dtype=torch.int64)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


# --- log-probabilities without gradients ---


def policy_logprobs(
    model: Sharded,
    samples: Sequence[Sample],
    temperature: float,
    budget: Budget,
    entropy: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(log p, entropy) of every sampled token of every sample, on every rank: float32 [n] per
    sample, 0 where not sampled.

    Collective. The work is split over the data-parallel ranks; `entropy` false leaves those arrays
    zero.
    """
    mesh = model.mesh
    plan = plan_step([len(sample) for sample in samples], budget, mesh.dp, mesh.sp)
    mine: dict[int, np.ndarray] = {}
    for members in plan[mesh.dp_rank]:
        whole = pack([samples[i] for i in members], mesh.sp)
        values = _pack_logprobs(model, whole, temperature, entropy).cpu().numpy()
        lengths = [len(samples[i]) for i in members]
        both = [unshift(row, lengths) for row in values]
        mine |= {i: np.stack([both[0][k], both[1][k]]) for k, i in enumerate(members)}
    found = gather_dicts(mine if mesh.sp_rank == 0 else {}, mesh.world_group)
    masked = [
        np.where(samples[i].mask, found[i], 0).astype(np.float32) for i in range(len(samples))
    ]
    return [m[0] for m in masked], [m[1] for m in masked]


def gather_dicts(
    mine: dict[int, np.ndarray], group: dist.ProcessGroup | None
) -> dict[int, np.ndarray]:
    """Every rank's entries, on every rank."""
    return {key: value for part in gather_objects(mine, group) for key, value in part.items()}


@torch.no_grad()
def _pack_logprobs(model: Sharded, whole: PackedBatch, temperature: float, entropy: bool) -> Tensor:
    """[2, T]: log p of each sampled label of a whole pack, and the entropy there; 0 elsewhere."""
    mesh = model.mesh
    part = whole.slice(mesh.sp_rank, mesh.sp)
    chosen = to_device(chosen_positions(part), mesh.device)
    batch = part.to(mesh.device)

    def score(hidden_tD: Tensor, weight_VD: Tensor) -> Tensor:
        logp, ent = logprobs(
            hidden_tD.index_select(0, chosen), weight_VD, batch.labels[chosen], temperature, entropy
        )
        out = torch.zeros(2, len(batch.tokens), dtype=logp.dtype, device=logp.device)
        out[0, chosen] = logp
        if ent is not None:
            out[1, chosen] = ent
        return out

    own: Tensor = model(batch, score)
    if mesh.sp_group is None:
        return own
    parts = [torch.empty_like(own) for _ in range(mesh.sp)]
    dist.all_gather(parts, own.contiguous(), group=mesh.sp_group)
    return torch.cat(parts, 1)


# --- the update ---


def loss_sum(model: Sharded, whole: RLBatch, spec: LossSpec) -> tuple[Tensor, Metrics]:
    """This rank's part of the global mini-batch's loss over its slice of a whole pack on the host:
    (0-d tensor, metric sums).

    Everything is weighted by the token's share already: parts of all ranks and micro-batches add up
    to the loss, no scale is left. With `spec.on_policy` the batch's `old` are the sampler's
    log-probabilities, which are only compared (`compare`); with `spec.compared` they are compared
    and the old ones.
    """
    mesh = model.mesh
    part = whole.slice(mesh.sp_rank, mesh.sp)
    chosen = to_device(chosen_positions(part.pack), mesh.device)
    batch = part.to(mesh.device)
    documents = len(whole.pack.seqlens)
    metrics: Metrics = {}

    def score(hidden_tD: Tensor, weight_VD: Tensor) -> Tensor:
        wants_entropy = spec.entropy_coeff != 0 or spec.measures
        logp, ent = logprobs(
            hidden_tD.index_select(0, chosen),
            weight_VD,
            batch.pack.labels[chosen],
            spec.temperature,
            wants_entropy,
        )
        old = batch.old[chosen].to(logp.dtype)
        weights = batch.weights[chosen].to(logp.dtype)
        if spec.measures:
            assert ent is not None
            metrics.update(compare(logp, old, ent, batch.pack.weights[chosen] != 0))
        if spec.on_policy:
            old = logp.detach()
        # Every loss here is linear in A's size
        advantages = (batch.advantages * batch.correction)[chosen].to(logp.dtype)
        means = None
        if spec.mode == "gspo":
            sequences = batch.sequences[chosen]
            sums = sequence_sums(logp, old, batch.pack.weights[chosen] != 0, sequences, documents)
            means = sequence_means(sum_over(sums, mesh.sp_group), sequences)
        loss, found = LOSSES[spec.mode](logp, old, advantages, weights, spec.clip, means)
        metrics.update(found)
        if ent is not None and spec.entropy_coeff != 0:
            bonus = entropy_sum(ent, weights)
            loss = loss - spec.entropy_coeff * bonus
            metrics["actor/entropy_loss"] = bonus.detach()
        if spec.use_kl:
            divergence = kl_sum(logp, batch.ref[chosen].to(logp.dtype), weights, spec.kl_kind)
            loss = loss + spec.kl_coef * divergence
            metrics["actor/kl_loss"] = divergence.detach()
        return loss

    return model(batch.pack, score), metrics


@torch.no_grad()
def compare(logp: Tensor, sampler: Tensor, entropy: Tensor, sampled: Tensor) -> Metrics:
    """The sampler's log-probabilities against the trainer's: "sums" [7] (count, |Δ log p|, its
    square, |Δ p|, its square, k3, entropy) and "most" [2] (|Δ log p|, |Δ p|).
    """
    logs = (sampler - logp).abs()
    probs = (sampler.exp() - logp.exp()).abs()
    d = log_ratio(logp, sampler)
    columns = torch.stack(
        [
            torch.ones_like(logs),
            logs,
            logs.square(),
            probs,
            probs.square(),
            torch.expm1(d) - d,
            entropy,
        ]
    )
    columns = torch.where(sampled, columns, 0).double()
    return {"sums": columns.sum(1), "most": columns[[1, 3]].amax(1)}


def gap_of(sums: Tensor, most: Tensor, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Metrics as `correction.gap_metrics` names them, and the entropy, from all ranks' "sums" and
    "most".
    """
    sum_over(sums, group)
    if group is not None:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    count, *total = sums.tolist()
    log, log2, prob, prob2, k3, entropy = (value / max(count, 1) for value in total)
    largest = most.tolist()
    out: dict[str, float] = {"training/rollout_actor_kl_k3": k3, "actor/entropy": entropy}
    for name, mean, square, top in (
        ("logp", log, log2, largest[0]),
        ("probs", prob, prob2, largest[1]),
    ):
        values = {"mean": mean, "max": top, "std": max(square - mean * mean, 0.0) ** 0.5}
        out |= {f"training/rollout_{name}_diff_{kind}": value for kind, value in values.items()}
    return out


@dataclass(frozen=True)
class Updated:
    """What an optimizer step measured, summed over all ranks; `skipped` where the gradient norm
    wasn't finite.
    """

    metrics: dict[str, float]
    grad_norm: float
    skipped: bool


def update_step(
    model: Sharded, optimizer: AdamW, batches: Iterable[RLBatch], spec: LossSpec, lr: float
) -> Updated:
    """Forward and backward of this rank's micro-batches of one global mini-batch, clip, update.

    Collective.
    """
    mesh = model.mesh
    model.zero_grad()
    totals: dict[str, Tensor] = {}
    for batch in batches:
        loss, metrics = loss_sum(model, batch, spec)
        optimizer.loss_scale.scaled(loss).backward()
        for name, value in {**metrics, "actor/loss": loss.detach()}.items():
            before = totals.get(name, torch.zeros_like(value, dtype=torch.float64))
            value = value.double()
            totals[name] = torch.maximum(before, value) if name == "most" else before + value
    model.finish_gradients()
    norm, skipped = optimizer.step(lr)
    gap = gap_of(totals.pop("sums"), totals.pop("most"), mesh.world_group) if spec.measures else {}
    names = sorted(totals)
    values = sum_over(torch.stack([totals[name] for name in names]), mesh.world_group)
    *sums, last_norm, last_skipped = torch.cat(
        [values, norm.double()[None], skipped.double()[None]]
    ).tolist()
    return Updated({**dict(zip(names, sums, strict=True)), **gap}, last_norm, bool(last_skipped))
