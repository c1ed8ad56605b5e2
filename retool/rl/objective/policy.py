"""The policy on packed batches: log-probabilities of what was sampled, and one optimizer step.

The policy is softmax(logits / temperature) over the whole vocabulary, in training as in sampling.

t tokens of this sequence-parallel rank · T of a whole pack · D model · V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from retool.batch import PackedBatch, Sample, pack, to_device
from retool.data.packing import Budget, plan_step
from retool.model.decoder import balance_of
from retool.model.experts.balance import NUMBERS, counted
from retool.model.logprobs import logprobs
from retool.optim import AdamW
from retool.parallel.collectives import gather_objects, sum_over
from retool.parallel.fsdp import Sharded
from retool.rl.objective.batching import RLBatch, unshift
from retool.rl.objective.losses import (
    LOSSES,
    Clip,
    LossInputs,
    Metrics,
    PolicyLoss,
    kl,
    log_ratio,
    sequence_means,
    sequence_sums,
)


@dataclass(frozen=True)
class LossSpec:
    """What an update minimises: policy loss - entropy_coeff · entropy + kl_coef · KL(policy ‖
    reference).

    `on_policy`: the present weights sampled everything and this is their only update, so that the
    old log-probabilities are the present ones without gradient. `compared`: the present weights
    sampled everything and the sampler's log-probabilities are the old ones.
    """

    loss: PolicyLoss = LOSSES["vanilla"]
    clip: Clip = field(default_factory=Clip)
    temperature: float = 1.0
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    use_kl: bool = False
    on_policy: bool = False
    compared: bool = False

    @property
    def measures(self) -> bool:
        """Whether the update measures the gap between sampler and trainer, and the entropy."""
        return self.on_policy or self.compared


def sampled_positions(part: PackedBatch) -> Tensor:
    """int64: positions of a rank's slice whose label was sampled. On the host.

    One of weight 0 where there is none, so that every rank runs the same graph and collectives.
    """
    positions = part.weights.nonzero()[:, 0]
    return positions if len(positions) else torch.zeros(1, dtype=torch.int64)


# --- log-probabilities without gradients ---


def policy_logprobs(
    model: Sharded,
    samples: Sequence[Sample],
    temperature: float,
    budget: Budget,
    entropy: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(log p, entropy) of every sampled token of every sample, on every rank.

    float32 [n] per sample, 0 where not sampled; the entropy is 0 everywhere without `entropy`.
    Collective: the work is split over the data-parallel ranks.
    """
    mesh = model.mesh
    lengths = [len(sample) for sample in samples]
    # Every rank makes the same plan of all samples, so nobody needs to be told what is whose.
    plan = plan_step(lengths, budget, mesh.dp, mesh.sp)
    mine: dict[int, np.ndarray] = {}
    for members in plan[mesh.dp_rank]:
        whole = pack([samples[i] for i in members], mesh.sp)
        values = _pack_logprobs(model, whole, temperature, entropy).cpu().numpy()
        logps, entropies = (unshift(row, [lengths[i] for i in members]) for row in values)
        for place, i in enumerate(members):
            mine[i] = np.stack([logps[place], entropies[place]])
    # The ranks of a sequence-parallel group have the same: one of them is enough.
    everyone = gather_dicts(mine if mesh.sp_rank == 0 else {}, mesh.world_group)
    masked = [
        np.where(sample.mask, everyone[i], 0).astype(np.float32) for i, sample in enumerate(samples)
    ]
    return [both[0] for both in masked], [both[1] for both in masked]


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
    chosen = to_device(sampled_positions(part), mesh.device)
    batch = part.to(mesh.device)

    def score(hidden_tD: Tensor, weight_VD: Tensor, cap: float = 0.0) -> Tensor:
        # Only what was sampled meets the vocabulary: prompts and tools' results cost no logits
        hidden = hidden_tD.index_select(0, chosen)
        labels = batch.labels[chosen]
        logp, entropies = logprobs(hidden, weight_VD, labels, temperature, entropy, cap=cap)
        out = torch.zeros(2, len(batch.tokens), dtype=logp.dtype, device=logp.device)
        out[0, chosen] = logp
        if entropies is not None:
            out[1, chosen] = entropies
        return out

    own: Tensor = model(batch, score)
    if mesh.sp_group is None:
        return own
    # Each rank of the group has scored its slice of the positions
    parts = [torch.empty_like(own) for _ in range(mesh.sp)]
    dist.all_gather(parts, own.contiguous(), group=mesh.sp_group)
    return torch.cat(parts, 1)


# --- the update ---


def loss_sum(model: Sharded, whole: RLBatch, spec: LossSpec) -> tuple[Tensor, Metrics]:
    """This rank's part of the global mini-batch's loss: (0-d tensor, metric sums).

    `whole` is a pack on the host, of which this rank computes its slice. Everything is weighted by
    the token's share already: parts of all ranks and micro-batches add up to the loss, no scale is
    left.
    """
    mesh = model.mesh
    part = whole.slice(mesh.sp_rank, mesh.sp)
    chosen = to_device(sampled_positions(part.pack), mesh.device)
    batch = part.to(mesh.device)
    documents = len(whole.pack.seqlens)
    # `score` runs inside the model's forward, where the head's weight is gathered. What it measures
    # leaves by way of this dict.
    metrics: Metrics = {}

    def score(hidden_tD: Tensor, weight_VD: Tensor, cap: float = 0.0) -> Tensor:
        hidden = hidden_tD.index_select(0, chosen)
        labels = batch.pack.labels[chosen]
        wants_entropy = spec.entropy_coeff != 0 or spec.measures
        temperature = spec.temperature
        logp, entropy = logprobs(hidden, weight_VD, labels, temperature, wants_entropy, cap=cap)
        inputs = loss_inputs(batch, chosen, logp, spec)
        if spec.loss.sequence_level:
            numbers = batch.sequences[chosen]
            # A document may lie on several ranks of the group: its mean needs all their sums
            sums = sequence_sums(logp, inputs.old_T, inputs.sampled_T, numbers, documents)
            means = sequence_means(sum_over(sums, mesh.sp_group), numbers)
            inputs = replace(inputs, sequence_log_ratio_T=means)
        loss, found = _whole_loss(inputs, entropy, spec)
        metrics.update(found)
        return loss

    return model(batch.pack, score), metrics


def loss_inputs(batch: RLBatch, chosen: Tensor, logp_T: Tensor, spec: LossSpec) -> LossInputs:
    """The sampled tokens of a rank's slice, whose present log-probabilities are `logp_T`."""
    dtype = logp_T.dtype
    # One factor for both: every loss here is linear in the advantage's size.
    advantages = batch.advantages * batch.correction
    return LossInputs(
        logp_T=logp_T,
        # Before the first update both are of the same weights: the ratio is 1, exactly
        old_T=logp_T.detach() if spec.on_policy else batch.old[chosen].to(dtype),
        sampler_T=batch.sampler[chosen].to(dtype),
        advantages_T=advantages[chosen].to(dtype),
        weights_T=batch.weights[chosen].to(dtype),
        sampled_T=batch.pack.weights[chosen] != 0,
        token_share=batch.token_share,
        clip=spec.clip,
        ref_T=batch.ref[chosen].to(dtype) if spec.use_kl else None,
    )


def _whole_loss(
    inputs: LossInputs, entropy_T: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Metrics]:
    """The policy loss with what `spec` adds to it, and what is measured beside."""
    loss, policy_metrics = spec.loss.function(inputs)
    metrics = dict(policy_metrics)
    if spec.measures:
        assert entropy_T is not None
        metrics |= compare(inputs.logp_T, inputs.sampler_T, entropy_T, inputs.sampled_T)
    if entropy_T is not None and spec.entropy_coeff != 0:
        bonus = inputs.sum(entropy_T)
        loss = loss - spec.entropy_coeff * bonus
        metrics["actor/entropy_loss"] = bonus.detach()
    if inputs.ref_T is not None:
        divergence = inputs.sum(kl(inputs.logp_T, inputs.ref_T, spec.kl_kind))
        loss = loss + spec.kl_coef * divergence
        metrics["actor/kl_loss"] = divergence.detach()
    return loss, metrics


@torch.no_grad()
def compare(logp_T: Tensor, sampler_T: Tensor, entropy_T: Tensor, sampled_T: Tensor) -> Metrics:
    """The sampler's log-probabilities against the trainer's, over sampled tokens, in float64.

    "sums" [7]: count, |Δ log p|, its square, |Δ p|, its square, k3, entropy. "most" [2]: the
    largest |Δ log p| and |Δ p|.
    """
    logs = (sampler_T - logp_T).abs()
    probs = (sampler_T.exp() - logp_T.exp()).abs()
    d = log_ratio(logp_T, sampler_T)
    k3 = torch.expm1(d) - d
    columns = torch.stack(
        [torch.ones_like(logs), logs, logs.square(), probs, probs.square(), k3, entropy_T]
    )
    columns = torch.where(sampled_T, columns, 0).double()
    return {"sums": columns.sum(1), "most": columns[[1, 3]].amax(1)}


def gap_of(sums: Tensor, most: Tensor, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Metrics as `correction.gap_metrics` names them, and the entropy, of all ranks' `compare`."""
    sum_over(sums, group)
    if group is not None:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    count, *totals = sums.tolist()
    log, log_square, prob, prob_square, k3, entropy = (total / max(count, 1) for total in totals)
    largest_log, largest_prob = most.tolist()
    return {
        "training/rollout_actor_kl_k3": k3,
        "actor/entropy": entropy,
        **_differences("logp", log, log_square, largest_log),
        **_differences("probs", prob, prob_square, largest_prob),
    }


def _differences(name: str, mean: float, mean_square: float, largest: float) -> dict[str, float]:
    # Rounding can bring the difference just below 0.
    std = max(mean_square - mean * mean, 0.0) ** 0.5
    values = {"mean": mean, "max": largest, "std": std}
    return {f"training/rollout_{name}_diff_{kind}": value for kind, value in values.items()}


@dataclass(frozen=True)
class Updated:
    """What an optimizer step measured, summed over all ranks.

    `skipped` where the gradient norm wasn't finite.
    """

    metrics: dict[str, float]
    grad_norm: float
    skipped: bool


def update_step(
    model: Sharded,
    optimizer: AdamW,
    batches: Sequence[RLBatch],
    spec: LossSpec,
    lr: float,
    beat: Callable[[], object] | None = None,
) -> Updated:
    """Forward and backward of this rank's micro-batches of one global mini-batch, clip, update.

    `beat` is called before each. Collective.
    """
    group = model.mesh.world_group
    balance = balance_of(model)
    model.zero_grad()
    if balance is not None:
        balance.begin(sum(batch.pack.real_tokens for batch in batches))
    # Sums stay on the device until the end: a number read here would make the host wait in every
    # micro-batch.
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, 1):
        if beat is not None:
            beat()
        with counted(balance, optimizer.loss_scale.value):
            loss, metrics = loss_sum(model, batch, spec)
        with model.last_backward() if number == len(batches) else nullcontext():
            optimizer.loss_scale.scaled(loss).backward()
        metrics["actor/loss"] = loss.detach()
        _add_up(totals, metrics)
    model.finish_gradients()
    norm, skipped = optimizer.step(lr)
    gap = gap_of(totals.pop("sums"), totals.pop("most"), group) if spec.measures else {}
    # Sorted: the ranks add up one tensor, in which each number must be at the same place.
    names = sorted(totals)
    values = sum_over(torch.stack([totals[name] for name in names]), group)
    if balance is not None:
        names += NUMBERS
        values = torch.cat([values, balance.numbers()])
    # One copy to the host for all of them: each waits for the device.
    *sums, last_norm, last_skipped = torch.cat(
        [values, norm.double()[None], skipped.double()[None]]
    ).tolist()
    return Updated({**dict(zip(names, sums, strict=True)), **gap}, last_norm, bool(last_skipped))


def _add_up(totals: dict[str, Tensor], metrics: Metrics) -> None:
    """Add a micro-batch's metrics, in float64; of "most" the larger one stays."""
    for name, metric in metrics.items():
        value = metric.double()
        before = totals.get(name, torch.zeros_like(value))
        totals[name] = torch.maximum(before, value) if name == "most" else before + value
