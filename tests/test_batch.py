"""Packs: nothing is predicted across documents, padding weighs nothing, slices are the pack."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from retool.batch import PackedBatch, Sample, pack, pack_apart


def samples(seed: int, count: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        Sample(rng.integers(1, 90, n).astype(np.int32), rng.random(n) < 0.5)
        for n in rng.integers(1, 20, count)
    ]


def documents(batch: PackedBatch) -> list[slice]:
    edges = batch.cu_seqlens.tolist()
    assert (
        edges[0] == 0
        and batch.seqlens == tuple(np.diff(edges))
        and batch.max_seqlen == max(batch.seqlens)
    )
    assert (
        edges[-1]
        == len(batch.tokens)
        == len(batch.labels)
        == len(batch.weights)
        == len(batch.positions)
    )
    return [slice(a, b) for a, b in pairwise(edges)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("multiple", "pad_to"), [(1, None), (4, None), (7, None), (1, 25), (6, 25)]
)
def test_a_pack_is_its_documents(seed: int, multiple: int, pad_to: int | None) -> None:
    rows = samples(seed, 1 + seed)
    batch = pack(rows, multiple, pad_to, pad_id=95)
    parts = documents(batch)
    assert len(batch.tokens) % multiple == 0 and len(parts) - len(rows) in (0, 1)
    for part, row in zip(parts, rows, strict=False):
        n = len(row)
        tokens = batch.tokens[part]
        assert tokens[:n].tolist() == row.tokens.tolist() and (tokens[n:] == 95).all()
        assert batch.positions[part].tolist() == list(range(len(tokens)))
        assert torch.equal(batch.labels[part][:-1], tokens[1:]), (
            "the next token of the same document"
        )
        assert batch.weights[part].tolist() == [
            *row.mask[1:].astype(float),
            *[0.0] * (len(tokens) - n + 1),
        ]
    assert (
        not batch.weights[sum(batch.seqlens[: len(rows)]) :].any()
        and float(batch.weights.sum()) == batch.trained_tokens
    )
    assert batch.real_tokens == sum(map(len, rows)) and batch.trained_tokens == sum(
        r.trained for r in rows
    )


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_slices_are_the_pack(size: int) -> None:
    whole = pack(samples(0, 5), 6)
    parts = [whole.slice(rank, size) for rank in range(size)]
    for name in ("tokens", "labels", "weights", "positions"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    assert all(
        torch.equal(p.cu_seqlens, whole.cu_seqlens) and p.seqlens == whole.seqlens for p in parts
    ), "of the whole pack"


def test_documents_that_begin_with_the_slices_are_theirs() -> None:
    rows = samples(0, 6)
    whole = pack_apart([rows[:2], rows[2:5], rows[5:]], pad_id=7)
    parts = [whole.slice(rank, 3) for rank in range(3)]
    for name in ("tokens", "labels", "weights", "positions"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    for part in parts:
        assert part.alone
        assert sum(part.seqlens) == len(part.tokens) and part.max_seqlen == max(part.seqlens)
        assert part.cu_seqlens.tolist() == [0, *accumulate(part.seqlens)]
        begins = part.positions == 0
        assert begins.nonzero()[:, 0].tolist() == part.cu_seqlens[:-1].tolist()
    everything = pack(rows)
    assert whole.real_tokens == everything.real_tokens
    assert whole.trained_tokens == everything.trained_tokens == int((whole.weights > 0).sum())
    assert torch.equal(whole.tokens[whole.real], everything.tokens)


def test_a_document_across_an_edge_belongs_to_all() -> None:
    whole = pack_apart([samples(0, 2), samples(1, 5)])
    assert not whole.slice(0, 1).alone, "one rank has nobody to share with"
    four = pack(samples(0, 5), 4)
    assert not any(four.slice(rank, 4).alone for rank in range(4))


def test_a_rank_without_samples_has_a_pack_too() -> None:
    batch = pack([], 4, pad_id=7)
    assert (
        batch.tokens.tolist() == [7] * 4
        and not batch.weights.any()
        and (batch.real_tokens, batch.trained_tokens) == (0, 0)
    )


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"a sample of 3 tokens is longer than pad_to=2"):
        pack([Sample(np.arange(3), np.ones(3, bool))], pad_to=2)
    with pytest.raises(ValueError, match="must be vectors of one length"):
        Sample(np.arange(3), np.ones(2, bool))
