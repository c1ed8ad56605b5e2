"""Sharding any module: n processes compute what one does, whatever the units, dtypes and buffers."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import Sharded, shard
from retool.parallel.fsdp.buffers import assign_buffers
from retool.parallel.fsdp.overlap import Pending
from retool.parallel.mesh import make_mesh
from retool.parallel.streams import record_event
from tests.parallel.layouts import reshard
from tests.parallel.streams import watched
from tests.ranks import run_ranks


class Net(nn.Module):
    """Uneven shapes, a shared matrix, a parameter that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 13), nn.Tanh(), nn.LayerNorm(13)) for _ in range(5)
        )
        self.last = nn.Linear(13, 13, bias=False)
        self.last.weight = self.blocks[0][0].weight  # shared between two units
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x).square().sum()


class Root(nn.Module):
    """Untied variant, each part a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 13), nn.Tanh(), nn.LayerNorm(13)) for _ in range(5)
        )
        self.last = nn.Linear(13, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x).square().sum()


def units_of(net: Root) -> list[tuple[str, list[nn.Module]]]:
    blocks: list[tuple[str, list[nn.Module]]] = [(f"b{i}", [b]) for i, b in enumerate(net.blocks)]
    return [("first", [net.first]), *blocks, ("last", [net.last])]


def train(
    fsdp_size: int, reshard: bool, prefetch: bool, steps: int = 6, freeze: bool = False
) -> tuple[list[float], list[float], np.ndarray]:
    """Losses, gradient norms and the final master weights (gathered) of a float64 run with two
    micro-batches a rank.
    """
    mesh = make_mesh(fsdp_size=fsdp_size)
    torch.manual_seed(0)
    net = Root().double()
    if freeze:
        net.blocks[1].requires_grad_(False)
        net.first.bias.requires_grad_(False)
    f64 = torch.float64
    sharded = shard(
        net,
        units_of(net),
        mesh,
        param_dtype=f64,
        master_dtype=f64,
        reduce_dtype=f64,
        reshard_after_forward=reshard,
        forward_prefetch=prefetch,
        backward_overlap=prefetch,
    )
    optimizer = AdamW(sharded, AdamWOptions(clip_grad=0.5))
    data = torch.randn(steps, 12, 7, dtype=f64, generator=torch.Generator().manual_seed(1))
    losses = []
    norms = []
    for x in data:
        sharded.zero_grad()
        mine = x[mesh.rank :: mesh.world].chunk(2)
        total = torch.zeros((), dtype=f64)
        for part in mine:
            loss = sharded(part) / 12
            loss.backward()
            total += loss.detach()
        if mesh.world_group is not None:
            torch.distributed.all_reduce(total)
        sharded.finish_gradients()
        norm, skipped = optimizer.step(1e-2)
        assert not skipped
        losses.append(float(total))
        norms.append(float(norm))
    for unit in sharded.units:
        unit.gather()
    weights = []
    for unit in sharded.units:
        unit.gather()
        weights += [p.detach().clone().flatten().numpy() for p in unit.parameters]
    return losses, norms, np.concatenate(weights)


@pytest.fixture(scope="module")
def single() -> tuple[list[float], list[float], np.ndarray]:
    return train(-1, True, True)


@pytest.mark.parametrize(
    ("world", "fsdp_size", "reshard", "prefetch"),
    [(2, -1, True, True), (3, -1, False, True), (4, 2, True, False), (4, -1, True, True)],
)
def test_n_processes_equal_one(
    single: tuple[list[float], list[float], np.ndarray],
    world: int,
    fsdp_size: int,
    reshard: bool,
    prefetch: bool,
) -> None:
    for losses, norms, weights in run_ranks(train, world, fsdp_size, reshard, prefetch):
        np.testing.assert_allclose(losses, single[0], rtol=1e-12)
        np.testing.assert_allclose(norms, single[1], rtol=1e-12)
        np.testing.assert_allclose(weights, single[2], rtol=1e-11, atol=1e-13)


def test_one_process_equals_plain_torch(
    single: tuple[list[float], list[float], np.ndarray],
) -> None:
    torch.manual_seed(0)
    net = Root().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    data = torch.randn(6, 12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for x, expected_loss, expected_norm in zip(data, single[0], single[1], strict=True):
        optimizer.zero_grad()
        loss = net(x) / 12
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-12)
        assert float(norm) == pytest.approx(expected_norm, rel=1e-12)
    np.testing.assert_allclose(
        torch.cat([p.detach().flatten() for p in net.parameters()]).numpy(), single[2], rtol=1e-6
    )


def test_frozen_parameters_stay_as_they_are() -> None:
    torch.manual_seed(0)
    before = torch.cat(
        [p.detach().flatten() for p in Root().double().blocks[1].parameters()]
    ).numpy()
    ones = train(-1, True, True, freeze=True)
    twos = run_ranks(train, 2, -1, True, True, 6, True)
    np.testing.assert_allclose(twos[0][2], ones[2], rtol=1e-11, atol=1e-13)
    start = 7 * 13 + 13 + len(before)
    np.testing.assert_array_equal(ones[2][start : start + len(before)], before)
    assert not np.array_equal(ones[2][: 7 * 13], train(-1, True, True, steps=0)[2][: 7 * 13])


def test_non_finite_gradient_changes_nothing() -> None:
    torch.manual_seed(0)
    net = Root()
    sharded = shard(net, units_of(net), make_mesh(), param_dtype=torch.float32)
    optimizer = AdamW(sharded, AdamWOptions())
    before = sharded.master.clone()
    (sharded(torch.randn(2, 7)) * float("nan")).backward()
    norm, skipped = optimizer.step(1e-3)
    assert torch.isnan(norm)
    assert skipped == 1 and optimizer.steps == 0
    assert torch.equal(sharded.master, before) and not optimizer.exp_avg.any()


@pytest.mark.parametrize(("master", "moments"), [(True, True), (True, False), (False, True)])
def test_an_offloaded_update_by_chunk_is_the_same(
    monkeypatch: pytest.MonkeyPatch, master: bool, moments: bool
) -> None:
    """On the CPU the visitors are copies in the same memory: what is left to test is which elements
    visit, and that they return.
    """
    monkeypatch.setattr("retool.optim.OFFLOAD_CHUNK_NUMEL", 256)

    def trained(offload: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = Root()
        net.blocks[1].requires_grad_(False)
        sharded = shard(net, units_of(net), make_mesh())
        optimizer = AdamW(sharded, AdamWOptions())
        optimizer.offload_master = offload and master
        optimizer.offload_moments = offload and moments
        for x in torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(1)).bfloat16():
            sharded.zero_grad()
            sharded(x).backward()
            optimizer.step(1e-2)
        return [sharded.master, sharded.compute, optimizer.exp_avg, optimizer.exp_avg_sq]

    for found, want in zip(trained(True), trained(False), strict=True):
        assert torch.equal(found, want)


def held_in_bf16(backwards: int) -> list[float]:
    """Gradients of 1, each from a micro-batch, reduced once in bf16."""
    mesh = make_mesh()
    net = nn.Linear(3, 1, bias=False)
    sharded = shard(
        net, [("all", [net])], mesh, param_dtype=torch.float32, reduce_dtype=torch.bfloat16
    )
    for number in range(1, backwards + 1):
        with sharded.no_sync() if number < backwards else nullcontext():
            sharded(torch.ones(1, 3)).sum().backward()
    return sharded.grad.tolist()


def test_held_gradients_add_up_in_fp32() -> None:
    grads = run_ranks(held_in_bf16, 2, 400)
    assert grads[0][:3] == [800.0] * 3, "added up in bf16 they would stall at 256 a rank"
    assert not any(grads[0][3:]) and not any(grads[1])


def trained_in_bf16(keep_copy: bool, reshard: bool) -> tuple[int, list[float], list[float]]:
    """Bytes, losses and master weights of a run that computes in bf16."""
    mesh = make_mesh()
    torch.manual_seed(0)
    net = Root()
    sharded = shard(net, units_of(net), mesh, keep_copy=keep_copy, reshard_after_forward=reshard)
    optimizer = AdamW(sharded, AdamWOptions())
    losses = []
    for x in torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(1)).bfloat16():
        sharded.zero_grad()
        loss = sharded(x[mesh.rank :: mesh.world])
        loss.backward()
        sharded.finish_gradients()
        optimizer.step(1e-2)
        losses.append(float(loss.detach()))
    return sharded.planned_bytes(), losses, sharded.master.tolist()


@pytest.mark.parametrize("reshard", [True, False])
def test_weights_cast_at_every_gather_train_bit_for_bit_alike(reshard: bool) -> None:
    for kept, cast in zip(
        run_ranks(trained_in_bf16, 2, True, reshard),
        run_ranks(trained_in_bf16, 2, False, reshard),
        strict=True,
    ):
        assert cast[1:] == kept[1:]
        assert kept[0] - cast[0] == 2 * len(kept[2]), "no copy of the shard"


def untrained() -> int:
    """Bytes of a module without gradients; its results are those of the module with them."""
    mesh = make_mesh()
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    sharded = []
    for trained in (True, False):
        torch.manual_seed(0)
        net = Root()
        sharded.append(shard(net, units_of(net), mesh, param_dtype=torch.float32, trained=trained))
    with torch.no_grad():
        assert torch.equal(sharded[0](x), sharded[1](x))
    sharded[0](x).backward()
    with pytest.raises(
        RuntimeError, match="without room for gradients: shard it with trained=True"
    ):
        sharded[1](x).backward()
    return sharded[1].planned_bytes()


def test_a_module_that_is_not_trained_has_no_room_for_gradients() -> None:
    numel = sum(p.numel() for p in Root().parameters())
    assert 4 * numel <= untrained() < 4 * numel + 4 * 128 * 22, (
        "its parameters, each up to a boundary"
    )
    assert all(4 * numel < taken < 8 * numel + 8 * 128 * 22 for taken in run_ranks(untrained, 2))


class Tied(nn.Module):
    """The first and the last module are one unit, as a tied embedding and head are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x).square().sum()


def units_of_tied(net: Tied) -> list[tuple[str, list[nn.Module]]]:
    blocks: list[tuple[str, list[nn.Module]]] = [(f"b{i}", [b]) for i, b in enumerate(net.blocks)]
    return [("ends", [net.first, net.last]), *blocks]


def noted_gathers(sharded: Sharded) -> list[int]:
    """A list that gets the index of each unit that is gathered from here on."""
    order = list[int]()
    gather = sharded.overlap.gather

    def noted(
        out: torch.Tensor,
        shard: torch.Tensor,
        group: dist.ProcessGroup,
        free: torch.cuda.Event | None,
    ) -> Pending:
        order.extend(
            unit.index for unit in sharded.units if unit.shard.data_ptr() == shard.data_ptr()
        )
        return gather(out, shard, group, free)

    sharded.overlap.gather = noted
    return order


def gathered_units() -> list[int]:
    """Which units are gathered, in order, for a forward and a backward."""
    net = Tied()
    sharded = shard(net, units_of_tied(net), make_mesh(), param_dtype=torch.float32)
    order = noted_gathers(sharded)
    sharded(torch.ones(2, 4)).backward()
    return order


def test_nothing_is_gathered_in_vain() -> None:
    for order in run_ranks(gathered_units, 2):
        assert order == [0, 1, 2, 3, 4, 2, 1], (
            "each once in the forward; in the backward what its buffer no longer holds"
        )


def scaled_by_its_norm(embed: nn.Module, _: object, out: torch.Tensor) -> torch.Tensor:
    assert isinstance(embed, nn.Embedding)
    return out * embed.weight.norm()


class Untied(nn.Module):
    """Embedding and head are of like size, and take turns in one buffer."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 61)
        if scaled:
            # Its backward needs the weights that its unit was gathered for
            self.embed.register_forward_hook(scaled_by_its_norm)

    def units(self) -> list[tuple[str, list[nn.Module]]]:
        blocks: list[tuple[str, list[nn.Module]]] = [
            (f"b{i}", [block]) for i, block in enumerate(self.blocks)
        ]
        return [("embed", [self.embed]), *blocks, ("head", [self.head])]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x).logsumexp(-1).sum()


def of_an_embedding(scaled: bool, looks: bool) -> tuple[list[int], list[float]]:
    """Which units two micro-batches gather, and this rank's gradient. Without `looks` a look-up isn't
    known as one.
    """
    torch.manual_seed(0)
    net = Untied(scaled)
    with pytest.MonkeyPatch.context() as patch:
        if not looks:
            patch.setattr("retool.parallel.fsdp.hooks._is_look_up", lambda _: False)
        sharded = shard(net, net.units(), make_mesh(), param_dtype=torch.float32)
        order = noted_gathers(sharded)
        for tokens in torch.arange(24).view(2, 12):
            sharded(tokens).backward()
    return order, sharded.grad.tolist()


EMBEDDING, HEAD = 0, 5


def of_embeddings() -> list[tuple[list[int], list[float]]]:
    return [of_an_embedding(scaled, looks) for scaled in (False, True) for looks in (True, False)]


def test_an_embeddings_backward_gathers_weights_only_where_it_needs_them() -> None:
    for (order, grad), (gathered, same), scaled, as_scaled in run_ranks(of_embeddings, 2):
        assert order.count(EMBEDDING) == order.count(HEAD) == 2, (
            "once a micro-batch, in its forward"
        )
        assert gathered.count(EMBEDDING) == 3 and grad == same
        assert scaled[0].count(EMBEDDING) == 3 and scaled == as_scaled


def ends_of_uses() -> tuple[int, int]:
    """Uses that begin in a micro-batch's forward and backward, and events that mark an end of one."""
    with watched(), pytest.MonkeyPatch.context() as patch:
        ends = list[torch.cuda.Event]()

        def noted() -> torch.cuda.Event:
            ends.append(record_event())
            return ends[-1]

        patch.setattr("retool.parallel.fsdp.unit.record_event", noted)
        net = Untied(scaled=False)
        sharded = shard(net, net.units(), make_mesh(), param_dtype=torch.float32)
        sharded(torch.arange(12)).backward()
    return 6 + 5, len(ends)


def test_a_gather_waits_for_the_last_use_and_no_longer() -> None:
    """An event at a backward's end, when a unit's last use is long over, would hold up the next gather."""
    for uses, ends in run_ranks(ends_of_uses, 2):
        assert ends == uses


def test_shared_matrix_and_unreached_parameter() -> None:
    torch.manual_seed(0)
    net = Net()
    reference = Net()
    reference.load_state_dict(net.state_dict())
    x = torch.randn(4, 7)
    reference(x).backward()
    sharded = shard(net, [("all", [net])], make_mesh(), param_dtype=torch.float32)
    sharded(x).backward()
    layout = sharded.units[0].layout
    for slot in layout.slots:
        wanted = dict(reference.named_parameters())[slot.name].grad
        found = sharded.grad[slot.offset : slot.offset + slot.numel].view(slot.shape)
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted)


def test_parameter_in_no_unit_is_named() -> None:
    net = Root()
    with pytest.raises(ValueError, match=r"first\.weight \(and 1 more\) is in no unit"):
        shard(net, units_of(net)[1:], make_mesh())


def test_parameters_start_where_the_compiler_needs_no_copy() -> None:
    """On 256 bytes in bf16, in the unit and, for its first, in every rank's shard."""
    net = Root()
    sharded = shard(net, units_of(net), make_mesh())
    assert all(p.storage_offset() * p.element_size() % 256 == 0 for p in net.parameters())
    for unit in reshard(sharded.layout, 3).units:
        assert (
            unit.start % 128 == unit.shard_numel % 128 == 0 and unit.numel == 3 * unit.shard_numel
        )


def test_buffers_alternate_and_neighbours_never_share() -> None:
    blocks = assign_buffers([100, 10, 10, 10, 10, 90], [False] * 6)
    assert blocks[0] == blocks[5] and len(set(blocks[1:5])) == 2
    assert all(a != b for a, b in pairwise(blocks))
    assert len(set(assign_buffers([10, 10, 10], [True] * 3))) == 3
