"""HSDP: gradients are added up over the replicas beside the last backward, and come to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retool.parallel.collectives import sum_over
from retool.parallel.fsdp import Sharded, shard
from retool.parallel.fsdp.overlap import Overlap, Pending
from retool.parallel.fsdp.reduce import Gradients
from retool.parallel.mesh import make_mesh
from tests.parallel.test_modules import data, made
from tests.ranks import run_ranks

CASES = ("twice", "gpt2", "gpt2 reentrant", "gpt2 checkpointed", "images", "towers")


def sharded(case: str) -> Sharded:
    module, units, _ = made(case)
    mesh = make_mesh(fsdp_size=2)
    return shard(module.float(), units, mesh, param_dtype=torch.float32)


def backwards(model: Sharded, case: str, hinted: bool, hold: bool) -> None:
    """Of three micro-batches, the last one of the step known as such or not."""
    _, _, loss = made(case)
    rank = model.mesh.rank
    for number, x in enumerate(data().flatten(0, 1)[:3].float().roll(rank, 0)):
        last = number == 2
        held = model.no_sync() if hold and not last else nullcontext()
        with held, model.last_backward() if last and hinted else nullcontext():
            loss(model, x).backward()


@contextmanager
def not_added() -> Iterator[None]:
    """Replicas keep their gradients to themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Overlap, "add_up", lambda *_: Pending())
        yield


def added_at_once(_: Overlap, shard: Tensor, group: torch.distributed.ProcessGroup) -> Pending:
    """What comes to the shard after a sum over the replicas began is missing in it, without a race."""
    sum_over(shard, group)
    return Pending()


def gradients(case: str, hold: bool) -> list[Tensor]:
    """Known as the last backward, the same with sums at once, not known, and added up in one piece after
    all backwards.
    """
    found = []
    for hinted, add_up in (
        (True, Overlap.add_up),
        (True, added_at_once),
        (False, Overlap.add_up),
    ):
        model = sharded(case)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Overlap, "add_up", add_up)
            backwards(model, case, hinted, hold)
            model.finish_gradients()
        found.append(model.grad)
    model = sharded(case)
    with not_added():
        backwards(model, case, False, hold)
        model.finish_gradients()
    assert not torch.equal(model.grad, found[0])
    return [*found, sum_over(model.grad, model.mesh.replica_group)]


def each_case(cases: tuple[str, ...], holds: tuple[bool, ...]) -> dict[str, list[np.ndarray]]:
    return {
        f"{case}, held {hold}": [grad.numpy() for grad in gradients(case, hold)]
        for case in cases
        for hold in holds
    }


def check(cases: tuple[str, ...], holds: tuple[bool, ...]) -> None:
    for rank in run_ranks(each_case, 4, cases, holds):
        for case, (*each, whole) in rank.items():
            for found in each:
                np.testing.assert_array_equal(found, whole, err_msg=case)


def test_sums_beside_the_backward_have_the_bits_of_one_after_it() -> None:
    check(("twice",), (False, True))


@pytest.mark.slow
def test_sums_of_every_case_have_the_bits_of_one_after_the_backward() -> None:
    check(CASES, (False, True))


class Reentrant(nn.Module):
    """Each checkpoint's backward is a backward of its own, inside the whole one; the first unit is used
    in two of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, again: bool) -> Tensor:
        for i in (0, 1, 0, 2):
            block = self.blocks[i]
            x = x + torch.tanh(checkpoint(block, x, use_reentrant=True) if again else block(x))
        return x.square().sum()


def of_reentrant() -> list[list[float]]:
    """Gradients of a last backward, with and without checkpoints."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        net = Reentrant()
        units = [(f"{i}", [unit]) for i, unit in enumerate(net.blocks)]
        model = shard(net, units, make_mesh(fsdp_size=1), param_dtype=torch.float32)
        x = torch.full((2, 8), 1.0 + model.mesh.rank, requires_grad=True)
        with model.last_backward():
            model(x, again).backward()
        model.finish_gradients()
        found.append(model.grad.tolist())
    return found


def test_a_backward_inside_the_last_one_belongs_to_it() -> None:
    for plain, again in run_ranks(of_reentrant, 2):
        assert any(plain) and again == plain


def order_of_events() -> list[str]:
    """When units are reduced and completed in two micro-batches, and when the last backward is over."""
    events = list[str]()
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model = shard(net, [(f"{i}", [unit]) for i, unit in enumerate(net)], make_mesh(fsdp_size=1))
    numbers = {id(unit.gradients): unit.index for unit in model.units}
    reduce = Gradients.reduce

    def noted(self: Gradients, hold: bool = False, wide: bool = False) -> None:
        events.append(f"reduce {numbers[id(self)]}")
        reduce(self, hold, wide)

    add_up = Overlap.add_up

    def adding(self: Overlap, shard: Tensor, group: torch.distributed.ProcessGroup) -> Pending:
        (unit,) = (u for u in model.units if u.gradients.shard.data_ptr() == shard.data_ptr())
        events.append(f"add {unit.index}")
        return add_up(self, shard, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gradients, "reduce", noted)
        patch.setattr(Overlap, "add_up", adding)
        x = torch.ones(2, 8, dtype=torch.bfloat16)
        model(x).sum().backward()
        with model.last_backward():
            model(x).sum().backward()
        events.append("the end")
        model.finish_gradients()
    return events


def test_a_unit_is_added_up_as_soon_as_its_gradient_is_whole() -> None:
    first = [f"reduce {i}" for i in (3, 2, 1, 0)]
    # The input needs no gradient: the end of the first unit's backward is the whole one's
    last = [event for i in (3, 2, 1) for event in (f"reduce {i}", f"add {i}")]
    for events in run_ranks(order_of_events, 2):
        assert events == [*first, *last, "reduce 0", "the end", "add 0"]
