"""Trajectories to packed batches, with everything a loss needs per token.

[Note: alignment] In a pack `labels[i]` is the token after `i`, so whatever belongs to a *sampled
token* stands at the position before it. Per-token arrays of a trajectory are indexed by token;
`shift` moves them, once, here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from retool.batch import PackedBatch, Sample, pack, to_device
from retool.data.packing import Budget, plan_step
from retool.rl.objective.losses import token_weights
from retool.rl.types import spans_of


@dataclass(frozen=True)
class Row:
    """A trajectory as the update sees it: arrays over all of its tokens, 0 where not sampled.

    `old`, `sampler` and `ref` are log-probabilities (nats): of the weights before the step's first
    update, as the engine told them when it sampled, and of the reference policy (None where there
    is none). `experts`: who computed each token when it was sampled (`Trajectory`). `correction` is
    the importance weight of the sampler. `cuts` are the trajectory's.
    """

    tokens: np.ndarray
    mask: np.ndarray
    old: np.ndarray
    sampler: np.ndarray
    advantage: np.ndarray
    correction: np.ndarray
    ref: np.ndarray | None = None
    experts: np.ndarray | None = None
    cuts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def spans(self) -> list[slice]:
        """The sequences of the trajectory, as slices."""
        return spans_of(self.cuts, len(self))

    def part(self, span: slice) -> Row:
        """One of its sequences as a row of its own."""
        return Row(
            self.tokens[span],
            self.mask[span],
            self.old[span],
            self.sampler[span],
            self.advantage[span],
            self.correction[span],
            ref=None if self.ref is None else self.ref[span],
            experts=None if self.experts is None else self.experts[span],
        )


@dataclass(frozen=True)
class RLBatch:
    """A pack and, at the position of each label, what the loss needs: float32 [T].

    `weights` is the token's share of the global mini-batch's mean (`losses.token_weights`); 0 where
    it wasn't sampled. `sequences` int64 [T] numbers the documents. `token_share` is 1 / sampled tokens
    of the global mini-batch.
    """

    pack: PackedBatch
    old: Tensor
    sampler: Tensor
    advantages: Tensor
    correction: Tensor
    weights: Tensor
    ref: Tensor
    sequences: Tensor
    token_share: float

    def tensors(self) -> dict[str, Tensor]:
        """All but the pack, by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def slice(self, rank: int, size: int) -> RLBatch:
        """The part of sequence-parallel rank `rank` of `size`."""
        step = self.old.shape[0] // size
        part = slice(rank * step, (rank + 1) * step)
        tensors = {name: tensor[part] for name, tensor in self.tensors().items()}
        return replace(self, pack=self.pack.slice(rank, size), **tensors)

    def to(self, device: torch.device) -> RLBatch:
        """Copy to `device`."""
        tensors = {name: to_device(tensor, device) for name, tensor in self.tensors().items()}
        return replace(self, pack=self.pack.to(device), **tensors)


def shift(arrays: Sequence[np.ndarray], total: int) -> np.ndarray:
    """Arrays over tokens, one after the other, moved to the position before.

    float32 [total], 0 at the documents' ends and after.
    """
    out = np.zeros(total, np.float32)
    start = 0
    for values in arrays:
        # A document's last position predicts nothing: its place stays 0
        out[start : start + len(values) - 1] = values[1:]
        start += len(values)
    return out


def unshift(values: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """The inverse of `shift` for a whole pack's values: an array per document, 0 at its first
    token.
    """
    out = []
    start = 0
    for length in lengths:
        own = np.zeros(length, np.float32)
        own[1:] = values[start : start + length - 1]
        out.append(own)
        start += length
    return out


def make_batch(
    rows: Sequence[Row], weights: Sequence[np.ndarray], multiple: int, token_share: float
) -> RLBatch:
    """Pack rows with their token weights; no rows at all give a dummy pack of weight 0."""
    packed = pack([Sample(row.tokens, row.mask, row.experts) for row in rows], multiple)
    total = len(packed.tokens)

    def tensor(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(shift(arrays, total))

    sequences = np.repeat(np.arange(len(packed.seqlens)), packed.seqlens)
    return RLBatch(
        packed,
        old=tensor([row.old for row in rows]),
        sampler=tensor([row.sampler for row in rows]),
        advantages=tensor([row.advantage for row in rows]),
        correction=tensor([row.correction for row in rows]),
        weights=tensor(weights),
        ref=tensor([row.ref if row.ref is not None else np.zeros(len(row)) for row in rows]),
        sequences=torch.from_numpy(sequences),
        token_share=token_share,
    )


def mini_batches(groups: Sequence[int], size: int) -> list[list[int]]:
    """Indices of trajectories per optimizer step: `size` consecutive groups each.

    The last may be smaller. `groups` numbers each trajectory's group, those of one group lying
    together.
    """
    # Each group once, in the order of their first trajectories
    order = list(dict.fromkeys(groups))
    step_of = {group: place // size for place, group in enumerate(order)}
    steps: list[list[int]] = [[] for _ in range(-(-len(order) // size))]
    for i, group in enumerate(groups):
        steps[step_of[group]].append(i)
    return steps


def rank_batches(
    rows: Sequence[Row],
    mode: str,
    max_response_length: int,
    dp_rank: int,
    dp: int,
    sp: int,
    budget: Budget,
) -> list[RLBatch]:
    """This rank's micro-batches of a global mini-batch.

    Equally many on every rank, work-balanced, and normalised over the whole mini-batch, whatever
    the layout. A trajectory has its share of the loss, in however many sequences it is.
    """
    shares = token_weights([row.mask for row in rows], mode, max_response_length)
    parts: list[Row] = []
    weights: list[np.ndarray] = []
    for row, share in zip(rows, shares, strict=True):
        for span in row.spans:
            parts.append(row.part(span) if row.cuts else row)
            weights.append(share[span])
    token_share = 1 / max(sum(int(row.mask.sum()) for row in rows), 1)
    plan = plan_step([len(part) for part in parts], budget, dp, sp)
    made = []
    for members in plan[dp_rank]:
        # Shortest first, as in SFT: kernels that treat long documents apart have two runs to do
        ordered = sorted(members, key=lambda i: len(parts[i]))
        chosen = [parts[i] for i in ordered]
        made.append(make_batch(chosen, [weights[i] for i in ordered], sp, token_share))
    return made
