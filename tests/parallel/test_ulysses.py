"""Sequence parallelism: any head counts, any number of ranks, the same result and the same
gradients as one process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from retool.batch import PackedBatch, Sample, pack
from retool.model import recompute as chunks
from retool.model.build import ModelOptions, build_decoder
from retool.model.recompute import Recompute
from retool.parallel.fsdp import Layout, local_pieces
from retool.parallel.mesh import make_mesh
from retool.parallel.ulysses import HeadPlan, _expand, split_heads
from tests.model.decoders import decoder_config
from tests.ranks import run_ranks

HEADS = [(14, 2), (9, 3), (8, 4), (6, 6)]


def whole_parameters(layout: Layout) -> dict[str, torch.Tensor]:
    """The same random weights whatever the layout."""
    generator = torch.Generator().manual_seed(0)
    return {
        m.name: torch.randn(m.shape, generator=generator, dtype=torch.float64) * 0.3
        for _, m in layout.members
    }


def batch(number: int = 0) -> PackedBatch:
    rng = np.random.default_rng(number)
    samples = [
        Sample(rng.integers(0, 61, n).astype(np.int32), rng.random(n) < 0.7) for n in (11, 1, 17, 6)
    ]
    return pack(samples, multiple=12)


def loss_and_gradients(
    heads: int,
    kv_heads: int,
    sp: int,
    recompute: Recompute,
    chunk: int = 0,
    packs: int = 1,
    fsdp_size: int = -1,
    compiled: bool = False,
) -> tuple[float, dict[str, np.ndarray]]:
    """Of the sum over `packs`, dealt to the sp groups in turn: (loss, this rank's part of the
    gradient).
    """
    if chunk:
        chunks.CHUNKED_FROM = chunks.CHUNK = chunks.ROUND = chunk
    mesh = make_mesh(sp=sp, fsdp_size=fsdp_size)
    f64 = torch.float64
    model = build_decoder(
        decoder_config(heads, kv_heads),
        mesh,
        ModelOptions(f64, f64, f64, recompute=recompute, use_compile=compiled),
    )
    weights = whole_parameters(model.layout)
    for piece in local_pieces(model.layout, mesh.shard_rank):
        model.master[piece.local : piece.local + piece.stop - piece.start] = weights[
            piece.member.name
        ].flatten()[piece.start : piece.stop]
    model.refresh()
    total = torch.zeros((), dtype=f64)
    for number in range(mesh.dp_rank, packs, mesh.dp):
        part = batch(number).slice(mesh.sp_rank, mesh.sp)

        def score(
            hidden: torch.Tensor, weight: torch.Tensor, part: PackedBatch = part
        ) -> torch.Tensor:
            logp = torch.log_softmax(hidden @ weight.t(), -1)
            return -(logp.gather(1, part.labels[:, None])[:, 0] * part.weights).sum()

        loss = model(part, score)
        loss.backward()
        total += loss.detach()
    model.finish_gradients()
    if mesh.world_group is not None:
        torch.distributed.all_reduce(total)
    found = {
        p.member.name + f":{p.start}": model.grad[p.local : p.local + p.stop - p.start].numpy()
        for p in local_pieces(model.layout, mesh.shard_rank)
    }
    return float(total), found


def joined(results: list[tuple[float, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Gradients of all ranks put together."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for _, found in results:
        for key, values in found.items():
            name, start = key.rsplit(":", 1)
            parts.setdefault(name, []).append((int(start), values))
    return {
        name: np.concatenate([v for _, v in sorted(pieces, key=lambda p: p[0])])
        for name, pieces in parts.items()
    }


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}/{h[1]}")
@pytest.mark.parametrize("sp", [2, 3, 4])
def test_sp_equals_one_process(heads: tuple[int, int], sp: int) -> None:
    expected_loss, expected = loss_and_gradients(*heads, 1, "none")
    # 18 tokens of a rank in chunks of 4
    how = {
        2: ("offload", 4),
        3: ("selective", 0),
        4: ("none", 0),
    }
    results = run_ranks(loss_and_gradients, sp, *heads, sp, *how[sp])
    gradients = joined(results)
    reference = joined([(0.0, expected)])
    assert results[0][0] == pytest.approx(expected_loss, rel=1e-13)
    assert gradients.keys() == reference.keys()
    for name, value in reference.items():
        assert np.linalg.norm(gradients[name] - value) <= 1e-12 * np.linalg.norm(value), name


@pytest.mark.parametrize(("sp", "fsdp_size"), [(2, 4), (2, 2), (2, 1), (4, 2), (1, 2)])
def test_sp_with_dp_and_replicas(sp: int, fsdp_size: int) -> None:
    """Four ranks, four packs: every replica has the gradient that one process finds."""
    expected_loss, expected = loss_and_gradients(14, 2, 1, "none", 0, 4)
    results = run_ranks(loss_and_gradients, 4, 14, 2, sp, "full", 7, 4, fsdp_size)
    assert results[0][0] == pytest.approx(expected_loss, rel=1e-13)
    for first in range(0, 4, fsdp_size):
        gradients = joined(results[first : first + fsdp_size])
        for name, value in joined([(0.0, expected)]).items():
            assert np.linalg.norm(gradients[name] - value) <= 1e-12 * np.linalg.norm(value), name


@pytest.mark.slow
@pytest.mark.parametrize(("sp", "recompute"), [(1, "full"), (2, "selective"), (2, "offload")])
def test_compiled_blocks_find_their_weights_again(sp: int, recompute: Recompute) -> None:
    """Weights that are gathered anew for the backward, ahead of it, into memory that the compiled
    forward has saved.
    """
    _, expected = loss_and_gradients(14, 2, 1, "none", 0, 2)
    gradients = joined(run_ranks(loss_and_gradients, 2, 14, 2, sp, recompute, 0, 2, -1, True))
    for name, value in joined([(0.0, expected)]).items():
        assert np.linalg.norm(gradients[name] - value) <= 1e-12 * np.linalg.norm(value), name


def exchanged(sp: int, recompute: Recompute) -> list[tuple[int, int]]:
    """(elements sent, received) of every all-to-all of a forward and backward."""
    seen = []
    exchange = torch.distributed.all_to_all_single

    def noted(out: torch.Tensor, send: torch.Tensor, *args: Any, **more: Any) -> Any:
        seen.append((send.numel(), out.numel()))
        return exchange(out, send, *args, **more)

    torch.distributed.all_to_all_single = noted
    loss_and_gradients(14, 2, sp, recompute)
    return seen


@pytest.mark.parametrize(("recompute", "again"), [("selective", 0), ("full", 2)])
def test_a_block_needs_two_exchanges_and_two_back(recompute: Recompute, again: int) -> None:
    """q, k and v in one, without padding: 14 query heads over 4 ranks are 4, 4, 3, 3, and ranks 0
    to 3 read 1, 2, 1, 1 kv heads.
    """
    layers = 2
    head = 8
    t = 9
    widths = [4 + 2 * 1, 4 + 2 * 2, 3 + 2 * 1, 3 + 2 * 1]
    for rank, seen in enumerate(run_ranks(exchanged, 4, 4, recompute)):
        there = (t * head * sum(widths), 4 * t * head * widths[rank])
        back = (4 * t * head * [4, 4, 3, 3][rank], t * head * 14)
        assert seen[: 2 * layers] == [there, back] * layers
        assert seen[2 * layers :] == [*[there, back][:again], back[::-1], there[::-1]] * layers


def test_kv_heads_travel_no_further_than_needed() -> None:
    plan = HeadPlan(sp=3, rank=1, heads=14, kv_heads=2, head_dim=8)
    assert [len(q) for q in plan.query_ranges] == [5, 5, 4]
    assert plan.kv_ranges == (range(0, 1), range(0, 2), range(1, 2))
    assert plan.expansion == (0, 0, 1, 1, 1), (
        "2 and 3 query heads on two kv heads: no uniform group"
    )
    assert HeadPlan(3, 0, 14, 2, 8).expansion is None
    assert HeadPlan(2, 1, 14, 2, 8).kv_ranges[1] == range(1, 2)


def test_gradients_of_kv_copies_are_added_in_fp32() -> None:
    """Of a kv head that 3 ranks read, and of one that 9 query heads of a rank expand: rounded to
    bf16 once, or not at all.
    """
    generator = torch.Generator().manual_seed(0)
    plan = HeadPlan(sp=3, rank=0, heads=9, kv_heads=1, head_dim=8)
    q, k, v = (torch.randn(40, n, 8, generator=generator, requires_grad=True) for n in (9, 1, 1))
    send = split_heads(q, k, v, plan, torch.bfloat16)
    there = torch.randn(send.shape, generator=generator).bfloat16()
    send.backward(there)
    assert k.grad is not None and torch.equal(
        k.grad[:, 0], there.view(3, 40, 5, 8)[:, :, 3].float().sum(0)
    )
    shared = torch.randn(40, 2, 8, generator=generator).bfloat16().requires_grad_()
    back = torch.randn(40, 10, 8, generator=generator).bfloat16()
    _expand(shared, (0,) * 9 + (1,)).backward(back)
    assert shared.grad is not None
    whole = torch.stack([back[:, :9].double().sum(1), back[:, 9].double()], 1)
    torch.testing.assert_close(shared.grad.double(), whole, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}/{h[1]}")
def test_every_query_head_finds_its_kv_head(heads: tuple[int, int]) -> None:
    for sp in range(1, heads[0] + 1):
        seen = []
        for rank in range(sp):
            plan = HeadPlan(sp, rank, *heads, 8)
            queries = plan.query_ranges[rank]
            kv = plan.kv_ranges[rank]
            uniform = len(queries) // len(kv)
            for i, q in enumerate(queries):
                local = plan.expansion[i] if plan.expansion is not None else i // uniform
                assert kv[local] == q // (heads[0] // heads[1])
            seen += queries
        assert seen == list(range(heads[0]))


def test_more_ranks_than_heads_is_refused() -> None:
    with pytest.raises(
        ValueError, match="ulysses_sequence_parallel_size=8 exceeds the model's 6 query heads"
    ):
        HeadPlan(8, 0, 6, 2, 8)
