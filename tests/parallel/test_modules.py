"""Sharding modules that aren't ours: two ranks find the gradients of plain torch in one process, or
refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retool.parallel.fsdp import Sharded, local_pieces, shard
from retool.parallel.fsdp.collect import Units
from retool.parallel.mesh import make_mesh
from tests.ranks import run_ranks

D = 16
# module, units, (model, [B, 6, D]) → loss
Case = tuple[nn.Module, Units, Callable[[nn.Module | Sharded, Tensor], Tensor]]


def each(name: str, modules: nn.ModuleList) -> Units:
    return [(f"{name}.{i}", [m]) for i, m in enumerate(modules)]


def each_of(net: nn.Module, *names: str) -> Units:
    return [(name, [net.get_submodule(name)]) for name in names]


def encoder() -> Case:
    layer = nn.TransformerEncoderLayer(D, 4, 24, dropout=0, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 3, nn.LayerNorm(D), enable_nested_tensor=False)
    assert net.norm is not None
    padded = torch.arange(6) > 3
    return (
        net,
        [*each("layers", net.layers), ("norm", [net.norm])],
        lambda m, x: m(x, src_key_padding_mask=padded.expand(len(x), 6)).square().sum(),
    )


def gpt2(reentrant: bool | None = None) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31,
        n_positions=8,
        n_embd=D,
        n_layer=3,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    net = GPT2LMHeadModel(config).train()
    if reentrant is not None:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    body = net.transformer
    units = [
        ("ends", [body.wte, net.lm_head]),
        ("wpe", [body.wpe]),
        *each("h", body.h),
        ("ln_f", [body.ln_f]),
    ]

    def loss(m: nn.Module | Sharded, x: Tensor) -> Tensor:
        tokens = (x[:, :, 0] * 100).long() % 31
        return m(input_ids=tokens, labels=tokens).loss * len(x)

    return net, units, loss


class Images(nn.Module):
    """Convolutions, one used twice, a frozen one, in-place activations, a unit without parameters,
    and a parameter that only some inputs reach.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.frozen = (
            nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)).eval().requires_grad_(False)
        )
        self.relu, self.tanh = nn.ReLU(inplace=True), nn.Tanh()
        self.last, self.rare = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        rare = x[0, 0, 0] > 0
        x = self.relu(self.first(x))
        x = self.second(self.relu(self.second(x)))
        x = self.tanh(self.frozen(x))
        return (self.rare(x) if rare else self.last(x)).square().sum()


def images() -> Case:
    net = Images()
    return (
        net,
        each_of(net, "first", "second", "frozen", "tanh", "rare", "last"),
        lambda m, x: m(torch.cat([x[:, :, :1].abs(), x[:, :, 1:]], 2)),
    )


class Twice(nn.Module):
    """Units called twice, not in their order, with others between that use the same buffers, and
    with hooks of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(5))
        for block in self.blocks:
            block.register_forward_pre_hook(lambda linear, args: args[0] * linear.weight.norm())
            block.register_forward_hook(lambda linear, _, out: out + linear.weight.mean())

    def forward(self, x: Tensor, order: tuple[int, ...] = (0, 1, 2, 0, 3, 1, 4, 0)) -> Tensor:
        for i in order:
            x = x + torch.tanh(self.blocks[i](x))
        return x.square().sum()


def twice() -> Case:
    net = Twice()
    return net, each("blocks", net.blocks), lambda m, x: m(x)


def sometimes() -> Case:
    net = Twice()

    def loss(m: nn.Module | Sharded, x: Tensor) -> Tensor:
        return m(x, order=(0, 1, 3, 4)) + m(x, order=(4, 2, 1))

    return net, each("blocks", net.blocks), loss


@dataclass
class Out:
    x: Tensor
    more: dict[str, tuple[Tensor, list[Tensor]]]


class Named(nn.Module):
    """Keyword arguments in, a dataclass out. One result only goes into the next block, which
    doesn't use it (its derivative is infinite); another is a list of what all blocks before have
    made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(D, D), nn.Parameter(torch.zeros(D))

    def forward(self, *, x: Tensor, seen: list[Tensor], spare: Tensor | None) -> Out:
        seen.append(self.inner(x))
        return Out(x + torch.tanh(seen[-1]), {"more": (self.gate.sqrt() * x, seen)})


class Dataclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Named() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        seen = list[Tensor]()
        spare = None
        for block in self.blocks:
            out = block(x=x, seen=seen, spare=spare)
            x, (spare, _) = out.x, out.more["more"]
        return x.square().sum() + torch.stack(seen).square().sum()


def dataclasses() -> Case:
    net = Dataclasses()
    return net, each("blocks", net.blocks), lambda m, x: m(x)


class Outer(nn.Module):
    """A unit around others: it uses a weight of its own before, between and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.mine = nn.Parameter(torch.randn(D, D) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.inner:
            x = x @ self.mine + torch.tanh(linear(x))
        return (x @ self.mine).square().sum()


def nested(last: bool = False) -> Case:
    net = Outer()
    outer = [("outer", [net])]
    inner = each("inner", net.inner)
    return net, [*inner, *outer] if last else [*outer, *inner], lambda m, x: m(x)


class Around(nn.Module):
    """Calls a module that has its matrix, too, before it uses that again."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(D, D), nn.Linear(D, D)
        self.inner.weight = self.outer.weight

    def forward(self, x: Tensor) -> Tensor:
        inside = self.inner(torch.tanh(self.outer(x)))
        return x + torch.tanh(self.outer(inside))


def around() -> Case:
    net = nn.Sequential(*(Around() for _ in range(4)))
    units = [(f"{i}", [block, block.inner]) for i, block in enumerate(net)]
    return net, units, lambda m, x: m(x).square().sum()


class Keeper(nn.Module):
    """Keeps its parameters in a dictionary of its own too, and that up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.weight = nn.Parameter(torch.randn(D, D) * 0.2)

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            self.kept[name] = value

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept["weight"]


class Recurrent(nn.Module):
    """Modules that keep their parameters in lists of their own, as torch's recurrent ones do;
    checkpoints around units.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.blocks = (
            nn.GRU(D, D, batch_first=True),
            nn.ModuleList([*(nn.Linear(D, D) for _ in range(3)), Keeper()]),
        )

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(x)
        for block in self.blocks:
            x = x + F.relu(checkpoint(block, x, use_reentrant=False), inplace=True)
        return x.square().sum()


def recurrent() -> Case:
    net = Recurrent()
    return net, [("rnn", [net.rnn]), *each("blocks", net.blocks)], lambda m, x: m(x)


class Towers(nn.Module):
    """Units whose inputs need no gradient, in the middle: no end of their backward is seen.

    `again`: the backward runs them again.
    """

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.ends = nn.ModuleList(
            nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        outs = [
            checkpoint(end, x, use_reentrant=False) if self.again else end(x) for end in self.ends
        ]
        return torch.stack(outs).prod(0).sum()


def towers(again: bool = False) -> Case:
    net = Towers(again)
    return net, each("ends", net.ends), lambda m, x: m(x)


CASES: dict[str, Callable[[], Case]] = {
    "encoder": encoder,
    "gpt2": gpt2,
    "gpt2 checkpointed": lambda: gpt2(False),
    "gpt2 reentrant": lambda: gpt2(True),
    "images": images,
    "twice": twice,
    "sometimes": sometimes,
    "dataclasses": dataclasses,
    "nested": nested,
    "nested, the outer last": lambda: nested(True),
    "around another of its unit": around,
    "recurrent": recurrent,
    "towers": towers,
    "towers checkpointed": lambda: towers(True),
}


def data() -> Tensor:
    # micro-batch, rank, B, tokens, D
    return torch.randn(
        2, 2, 3, 6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def made(case: str) -> Case:
    torch.manual_seed(0)
    module, units, loss = CASES[case]()
    return module.double(), units, loss


def sharded_gradients(case: str) -> list[tuple[str, int, np.ndarray]]:
    """Two micro-batches on this rank: (name, first element, values) of what it owns."""
    module, units, loss = made(case)
    mesh = make_mesh()
    f64 = torch.float64
    model = shard(module, units, mesh, param_dtype=f64, master_dtype=f64, reduce_dtype=f64)
    for micro_batch in data():
        loss(model, micro_batch[mesh.rank]).backward()
    pieces = local_pieces(model.layout, mesh.shard_rank)
    return [
        (p.member.name, p.start, model.grad[p.local : p.local + p.stop - p.start].numpy())
        for p in pieces
    ]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_find_plain_torchs_gradients(case: str) -> None:
    module, _, loss = made(case)
    for part in data().flatten(0, 1):
        loss(module, part).backward()
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, start, values in (
        piece for rank in run_ranks(sharded_gradients, 2, case) for piece in rank
    ):
        found.setdefault(name, []).append((start, values))
    assert found.keys() == dict(module.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        grads = np.concatenate(
            [values for _, values in sorted(found[name], key=lambda piece: piece[0])]
        )
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        np.testing.assert_allclose(
            grads, wanted.flatten().numpy(), rtol=1e-12, atol=1e-12, err_msg=name
        )


def mixed_gradients(reduce_dtype: torch.dtype) -> list[tuple[str, int, np.ndarray]]:
    module, units, loss = made("encoder")
    mesh = make_mesh()
    model = shard(module.float(), units, mesh, reduce_dtype=reduce_dtype)
    assert (model.master.dtype, model.grad.dtype, next(module.parameters()).dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    for micro_batch in data():
        loss(model, micro_batch[mesh.rank].bfloat16()).backward()
    pieces = local_pieces(model.layout, mesh.shard_rank)
    return [
        (p.member.name, p.start, model.grad[p.local : p.local + p.stop - p.start].numpy())
        for p in pieces
    ]


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision(reduce_dtype: torch.dtype) -> None:
    """Each rank's bf16 gradients, those of two ranks added in the reduction's dtype, those of
    micro-batches in fp32: to the bit.
    """
    module, _, loss = made("encoder")
    module.float().bfloat16()
    wanted = {name: torch.zeros(p.shape) for name, p in module.named_parameters()}
    for ranks in data():
        found = []
        for part in ranks:
            module.zero_grad()
            loss(module, part.bfloat16()).backward()
            found.append(
                {
                    n: p.grad.to(reduce_dtype)
                    for n, p in module.named_parameters()
                    if p.grad is not None
                }
            )
        for name in wanted:
            wanted[name] += found[0][name] + found[1][name]
    for name, start, values in (
        piece for rank in run_ranks(mixed_gradients, 2, reduce_dtype) for piece in rank
    ):
        np.testing.assert_array_equal(
            values, wanted[name].flatten()[start : start + len(values)].numpy(), err_msg=name
        )
