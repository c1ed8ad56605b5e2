"""Mixtures of experts: routing, grouped products and the load-balance loss, against transformers and
the plainest way to compute them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.data.packing import Budget, plan_step
from retool.model.build import ModelOptions
from retool.model.config import Experts
from retool.model.decoder import balance_of
from retool.model.experts.balance import NUMBERS, Balance
from retool.model.experts.products import experts_mlp, grouped_by_loop, sort_by_expert
from retool.model.experts.routing import chosen_experts, probabilities, weights_of
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import local_pieces
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.sft.step import train_step
from tests.model.tiny import make, stored_gradients
from tests.ranks import run_ranks

F64 = torch.float64
IN_F64 = ModelOptions(F64, F64, F64)
COEFFICIENT = 0.5  # large, so that a wrong gradient of it would show
FAMILIES = ["qwen3_moe", pytest.param("olmoe", marks=pytest.mark.slow)]


def samples() -> list[Sample]:
    """Conversations of one global batch, with prompts that aren't trained."""
    rng = np.random.default_rng(7)
    lengths = (17, 5, 40, 9, 23, 12)
    return [Sample(rng.integers(3, 131, n).astype(np.int32), rng.random(n) < 0.6) for n in lengths]


def one_step(
    folder: str,
    sp: int,
    recompute: Recompute,
    micro_batches: int,
    pad_to: int | None,
    ep: int = 1,
    fsdp_size: int = -1,
    **options: Any,
) -> Any:
    """This rank's part of a step's gradients, the loss, and what is told of the balance."""
    mesh = make_mesh(sp=sp, ep=ep, fsdp_size=fsdp_size)
    model = load_pretrained(
        folder, mesh, ModelOptions(F64, F64, F64, recompute=recompute, **options)
    )
    rows = samples()
    budget = Budget(micro_batch_size=-(-len(rows) // (mesh.dp * micro_batches)))
    plan = plan_step([len(row) for row in rows], budget, mesh.dp, sp)
    mine = [pack([rows[i] for i in chosen], sp, pad_to) for chosen in plan[mesh.dp_rank]]
    # A dummy at the end: every rank has one, and it must count for nothing
    mine.append(pack([], sp))
    trained = sum(row.trained for row in rows)
    optimizer = AdamW(model, AdamWOptions(clip_grad=1e9))
    measured = train_step(model, optimizer, mine, trained, 0.0, StepTimer(mesh.device))
    gradients = {
        (piece.member.name, piece.start): model.grad[
            piece.local : piece.local + piece.stop - piece.start
        ].numpy()
        for piece in local_pieces(model.layout, mesh.shard_rank)
    }
    return measured.read()[0], measured.read_balance(), gradients


def by_transformers(folder: Path) -> tuple[float, float, dict[str, torch.Tensor]]:
    """The loss, the balance loss, and the gradients of both, of the padded global batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=F64, experts_implementation="eager")
    rows = samples()
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    there = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, -100)
    for i, row in enumerate(rows):
        own = torch.from_numpy(row.tokens.astype(np.int64))
        tokens[i, : len(row)] = own
        there[i, : len(row)] = 1
        labels[i, : len(row)] = torch.where(torch.from_numpy(row.mask), own, -100)
    out = model(tokens, attention_mask=there, labels=labels)
    out.loss.backward()
    return out.loss.item(), out.aux_loss.item(), stored_gradients(model)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("experts")
    make(folder, request.param, router_aux_loss_coef=COEFFICIENT)
    return folder, by_transformers(folder)


def compare(results: list[Any], wanted: tuple[float, float, dict[str, torch.Tensor]]) -> None:
    total, balance_loss, gradients = wanted
    found: dict[str, np.ndarray] = {}
    for loss, told, pieces in results:
        assert told["router/balance_loss"] == pytest.approx(balance_loss, rel=1e-6)
        whole = loss + COEFFICIENT * told["router/balance_loss"]
        assert whole == pytest.approx(total, rel=1e-6)
        for (name, start), values in pieces.items():
            flat = found.setdefault(name, np.zeros(gradients[name].numel()))
            flat[start : start + len(values)] = values
    assert found.keys() == gradients.keys()
    for name, values in found.items():
        expected = gradients[name].flatten().numpy()
        # Of an expert that no token chose both are 0
        assert np.linalg.norm(values - expected) <= 1e-6 * np.linalg.norm(expected), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_with_balance_and_gradients_equal_transformers(
    trained: Any, recompute: Recompute
) -> None:
    folder, wanted = trained
    compare([one_step(str(folder), 1, recompute, 1, None)], wanted)


def layouts(folder: str) -> list[Any]:
    """Data-parallel and sequence-parallel, with all experts on each rank and divided."""
    return [one_step(folder, sp, "full", 1, None, ep) for ep in (1, 2) for sp in (1, 2)]


def test_two_ranks_balance_the_global_batch(trained: Any) -> None:
    """f is summed over the ranks before the backward: neither dp, sp nor ep changes the loss."""
    folder, wanted = trained
    for layout in zip(*run_ranks(layouts, 2, str(folder)), strict=True):
        compare(list(layout), wanted)


def test_padding_is_no_token(trained: Any) -> None:
    folder, wanted = trained
    compare([one_step(str(folder), 1, "none", 1, 48)], wanted)


def test_the_balance_of_several_micro_batches_is_told_of_the_whole_step(trained: Any) -> None:
    folder, (total, balance_loss, _) = trained
    loss, told, _ = one_step(str(folder), 1, "full", 3, None)
    assert told["router/balance_loss"] == pytest.approx(balance_loss, rel=1e-6)
    assert loss + COEFFICIENT * balance_loss == pytest.approx(total, rel=1e-6)


def test_the_last_micro_batch_is_pulled_by_the_whole_steps_choices(tmp_path: Path) -> None:
    """By the formula: coefficient · X · f / (layers · tokens), f of all micro-batches so far."""
    sizes = Experts(count=4, per_token=1, width=8, normalised=False, balance_coefficient=2.0)
    balance = Balance(sizes, layers=1, mesh=make_mesh())
    balance.begin(8)
    probs = torch.full((4, 4), 0.25, requires_grad=True)
    for expert in (0, 1):
        with balance.forward(torch.tensor(3.0)):
            chosen = torch.full((4, 1), expert)
            out = balance.seen(0, probs, chosen, torch.tensor([True, True, True, False]))
    out.sum().backward()
    assert probs.grad is not None
    # f is 1/2 for both, and 3 scales the loss; 1 is the gradient of the sum
    pulled = 1 + 3 * 2.0 * 4 * 0.5 / 8
    expected = torch.tensor([[pulled, pulled, 1, 1]] * 3 + [[1.0] * 4])
    torch.testing.assert_close(probs.grad, expected)


def test_what_is_told_of_balance() -> None:
    """Two layers of two experts: the first is balanced, the second uses one of them only."""
    balance = Balance(Experts(2, 1, 8, normalised=False), layers=2, mesh=make_mesh())
    balance.begin(4)
    even = torch.full((4, 2), 0.5)
    with balance.forward(torch.ones(())):
        balance.seen(0, even, torch.tensor([[0], [1], [0], [1]]), None)
        balance.seen(1, even, torch.tensor([[0], [0], [0], [0]]), None)
    told = dict(zip(NUMBERS, balance.numbers().tolist(), strict=True))
    assert told["router/entropy"] == pytest.approx(np.log(2))
    assert told["router/most_used"] == 2
    assert told["router/least_used"] == 0
    # f = (6/8, 2/8), P = (1/2, 1/2)
    assert told["router/balance_loss"] == pytest.approx(1)


def test_validation_counts_nothing(tmp_path: Path) -> None:
    make(tmp_path, "qwen3_moe")
    model = load_pretrained(tmp_path, make_mesh(), IN_F64)
    balance = balance_of(model)
    assert balance is not None
    with torch.no_grad():
        model(pack(samples()), lambda hidden, weight: hidden @ weight.t())
    assert balance.counts.sum() == 0


def dense_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Every token through each of its experts, one by one."""
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(experts[token], weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += weight * (down[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 13])
def test_grouped_products_equal_token_by_token(tokens: int) -> None:
    """One expert gets every token, others none."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).requires_grad_()

    inputs = (random(tokens, 6), random(tokens, 2), random(5, 8, 6), random(5, 6, 4))
    x, weights, gate_up, down = inputs
    others = torch.randint(0, 3, (tokens, 1), generator=generator)
    experts = torch.cat([torch.full((tokens, 1), 4), others], 1)
    ours = experts_mlp(x, experts, weights, gate_up, down)
    plain = dense_experts(x, experts, weights, gate_up, down)
    torch.testing.assert_close(ours, plain)
    direction = torch.randn(tokens, 6, generator=generator, dtype=F64)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, direction),
        torch.autograd.grad(plain, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_loop_is_what_the_kernel_computes() -> None:
    """torch's own grouped product, where it runs on the CPU; on a GPU it is what `grouped` takes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 16, generator=generator).bfloat16().requires_grad_()
    weights = torch.randn(4, 24, 16, generator=generator).bfloat16().requires_grad_()
    where = sort_by_expert(torch.tensor([3, 0, 0, 3, 1, 3, 3, 1, 0, 0, 3])[:, None], 4)
    assert where.ends.tolist() == [4, 6, 6, 11]
    by_loop = grouped_by_loop(rows, weights, where.ends)
    by_kernel = F.grouped_mm(rows, weights.transpose(1, 2), offs=where.ends)
    torch.testing.assert_close(by_loop, by_kernel)
    direction = torch.randn(by_loop.shape, generator=generator).bfloat16()
    for one, other in zip(
        torch.autograd.grad(by_loop, (rows, weights), direction),
        torch.autograd.grad(by_kernel, (rows, weights), direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_given_experts_are_taken_and_their_weights_computed_anew() -> None:
    sizes = Experts(count=6, per_token=2, width=8, normalised=True)
    generator = torch.Generator().manual_seed(1)
    x, router = (torch.randn(n, 5, generator=generator) for n in (4, 6))
    probs = probabilities(x, router)
    own = chosen_experts(probs, sizes)
    given = torch.tensor([[5, 0], [1, 2], [-1, -1], [3, 4]], dtype=torch.int16)
    chosen = chosen_experts(probs, sizes, given)
    assert chosen[[0, 1, 3]].tolist() == [[5, 0], [1, 2], [3, 4]]
    assert chosen[2].tolist() == own[2].tolist()
    picked = probs.gather(1, chosen)
    torch.testing.assert_close(
        weights_of(probs, chosen, sizes), picked / picked.sum(1, keepdim=True)
    )
