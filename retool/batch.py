"""The one batch layout: documents packed end to end, with `cu_seqlens` marking where each begins.

Shapes: T tokens of the whole pack · t tokens of one sequence-parallel rank · B documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

NO_EXPERTS = -1  # of a token whose router chooses for itself
IGNORED_LABEL = 0  # a weight of 0 marks it; any valid id keeps gathers in range


@dataclass(frozen=True)
class Sample:
    """One rendered conversation.

    `tokens` int32 [n]; `mask` bool [n], True where the model itself would have sampled the token,
    so that it is trained as a *target*. Position 0 can't be a target: its mask is ignored by
    `pack`. `experts` int8 or int16 [n, layers, k]: who is to compute each token, see `PackedBatch`.
    """

    tokens: np.ndarray
    mask: np.ndarray
    experts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.tokens.shape != self.mask.shape or self.tokens.ndim != 1:
            raise ValueError(
                f"tokens {self.tokens.shape} and mask {self.mask.shape} must be vectors of one length."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """Tokens that enter the loss."""
        return int(self.mask[1:].sum())


@dataclass(frozen=True)
class PackedBatch:
    """Documents packed end to end.

    `tokens`, `labels`, `positions` int64 [T] and `weights` float32 [T] are sliced for a
    sequence-parallel rank. `cu_seqlens` int32 [B+1], `max_seqlen` and `seqlens` describe the whole
    pack, unless no document of it lies on two ranks: then a slice is `alone`, and they describe its
    own documents (never where all are to be `divided`). `labels[i]` is the token after `i` in the same
    document; `weights[i]` is 0 where that label isn't trained (a document's last token among them).
    `real` bool [T] is False for padding, and sliced too; `real_tokens` and `trained_tokens` count the
    whole pack without it.

    `experts` int16 [T, layers, k], sliced, has the experts that each token is to be computed by
    (`retool.model.experts.routing.chosen_experts`), `NO_EXPERTS` where the router chooses; None: it
    does everywhere.

    `room`: tokens, the most that any rank needs for its part of the packs that run at the same time, or
    more where documents are many; 0 where that isn't known, or a document lies on two ranks.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    seqlens: tuple[int, ...]
    real_tokens: int
    trained_tokens: int
    experts: torch.Tensor | None = None
    alone: bool = False
    divided: bool = False
    room: int = 0

    def slice(self, rank: int, size: int) -> PackedBatch:
        """The part of sequence-parallel rank `rank` of `size`: T/size consecutive tokens."""
        total = self.tokens.shape[0]
        assert total % size == 0, (
            f"a pack of {total} tokens doesn't split over {size} sequence-parallel ranks"
        )
        part = slice(rank * (total // size), (rank + 1) * (total // size))
        return replace(
            self._documents_of(part, total // size),
            tokens=self.tokens[part],
            labels=self.labels[part],
            weights=self.weights[part],
            positions=self.positions[part],
            real=self.real[part],
            experts=None if self.experts is None else self.experts[part],
        )

    def _documents_of(self, part: slice, width: int) -> PackedBatch:
        """With the documents of `part` alone, where every rank's `width` tokens begin with one."""
        total = self.tokens.shape[0]
        begins = [0, *accumulate(self.seqlens)]
        # A document begins wherever a rank's part does: then none lies on two ranks.
        apart = set(range(0, total, width)) <= set(begins)
        if self.divided or width == total or not apart:
            return self
        first, stop = begins.index(part.start), begins.index(part.stop)
        seqlens = self.seqlens[first:stop]
        return replace(
            self,
            cu_seqlens=edges(seqlens),
            seqlens=seqlens,
            max_seqlen=max(seqlens),
            alone=True,
        )

    def to(self, device: torch.device) -> PackedBatch:
        """Copy to `device` without a host synchronisation.

        The source is pinned on the way to CUDA.
        """
        return replace(
            self,
            tokens=to_device(self.tokens, device),
            labels=to_device(self.labels, device),
            weights=to_device(self.weights, device),
            positions=to_device(self.positions, device),
            real=to_device(self.real, device),
            experts=None if self.experts is None else to_device(self.experts, device),
            cu_seqlens=to_device(self.cu_seqlens, device),
        )


def edges(seqlens: Sequence[int]) -> torch.Tensor:
    """Where each document begins, and the last one ends: int32 [B+1]."""
    return torch.from_numpy(np.cumsum([0, *seqlens], dtype=np.int32))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the host to `device`; the host doesn't wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    # From pageable memory the copy would wait for the device, non_blocking or not.
    return tensor.pin_memory().to(device, non_blocking=True)


def pack(
    samples: Sequence[Sample], multiple: int = 1, pad_to: int | None = None, pad_id: int = 0
) -> PackedBatch:
    """Pack samples.

    The tail is padded to a multiple of `multiple`, as a document of its own with weight 0.

    `pad_to` first pads every sample to that length (the `use_remove_padding=false` baseline). No
    samples at all gives a dummy pack of `multiple` weight-0 tokens, for a rank that must join the
    collectives of the others.
    """
    tokens = []
    labels = []
    weights = []
    positions = []
    real = []
    seqlens = []

    def add(ids: np.ndarray, mask: np.ndarray, padding: int) -> None:
        n = len(ids)
        shifted = np.full(n, IGNORED_LABEL, np.int64)
        weight = np.zeros(n, np.float32)
        # Shifted here, before anything is sliced: the label of a rank's last token is on the next
        # rank.
        shifted[:-1], weight[:-1] = ids[1:], mask[1:]
        tokens.append(ids.astype(np.int64))
        labels.append(shifted)
        weights.append(weight)
        positions.append(np.arange(n, dtype=np.int64))
        real.append(np.arange(n) < n - padding)
        seqlens.append(n)

    for sample in samples:
        spare = 0 if pad_to is None else pad_to - len(sample)
        if spare < 0:
            raise ValueError(f"a sample of {len(sample)} tokens is longer than pad_to={pad_to}.")
        add(
            np.pad(sample.tokens, (0, spare), constant_values=pad_id),
            np.pad(sample.mask, (0, spare), constant_values=False),
            padding=spare,
        )
    total = sum(seqlens)
    tail = multiple if total == 0 else -total % multiple
    if tail:
        add(np.full(tail, pad_id, np.int32), np.zeros(tail, bool), padding=tail)
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate(tokens)),
        labels=torch.from_numpy(np.concatenate(labels)),
        weights=torch.from_numpy(np.concatenate(weights)),
        positions=torch.from_numpy(np.concatenate(positions)),
        real=torch.from_numpy(np.concatenate(real)),
        cu_seqlens=edges(seqlens),
        max_seqlen=max(seqlens),
        seqlens=tuple(seqlens),
        real_tokens=sum(map(len, samples)),
        trained_tokens=sum(s.trained for s in samples),
        experts=_given_experts(samples, seqlens),
    )


def pack_apart(shares: Sequence[Sequence[Sample]], pad_id: int = 0) -> PackedBatch:
    """Pack a share of samples for each sequence-parallel rank, so that none lies on two.

    The shares are padded to the longest, each by a document with weight 0.
    """
    longest = max(sum(map(len, share)) for share in shares)
    packs = [pack(share, longest, pad_id=pad_id) for share in shares]
    seqlens = tuple(length for part in packs for length in part.seqlens)
    given = [part.experts for part in packs if part.experts is not None]
    assert not given, "documents with experts of their own are packed by `pack`"

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in packs])

    return PackedBatch(
        tokens=joined("tokens"),
        labels=joined("labels"),
        weights=joined("weights"),
        positions=joined("positions"),
        real=joined("real"),
        cu_seqlens=edges(seqlens),
        max_seqlen=max(seqlens),
        seqlens=seqlens,
        real_tokens=sum(part.real_tokens for part in packs),
        trained_tokens=sum(part.trained_tokens for part in packs),
    )


def _given_experts(
    samples: Sequence[Sample],
    seqlens: Sequence[int],
) -> torch.Tensor | None:
    """[T, layers, k], -1 where a token has none; None where no token has."""
    given = [sample.experts for sample in samples if sample.experts is not None]
    if not given:
        return None
    out = np.full((sum(seqlens), *given[0].shape[1:]), NO_EXPERTS, np.int16)
    start = 0
    for sample, length in zip(samples, seqlens, strict=False):
        if sample.experts is not None:
            out[start : start + len(sample)] = sample.experts
        start += length
    return torch.from_numpy(out)
