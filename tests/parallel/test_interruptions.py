"""What may come between two steps leaves the second as it would have been; what can't be sharded is
refused with the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import Sharded, shard
from retool.parallel.mesh import make_mesh
from tests.ranks import run_ranks

D = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor, fails: type[BaseException] | None) -> Tensor:
        y = x + torch.tanh(self.linear(x))
        if fails is not None:
            raise fails
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(
        self,
        x: Tensor,
        fails_at: int = -1,
        backward_fails_at: int = -1,
        error: type[BaseException] = ZeroDivisionError,
    ) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, error if i == fails_at else None)
            if i == backward_fails_at:
                x.register_hook(_fail)
        return x.square().sum()


def _fail(_: Tensor) -> None:
    raise ZeroDivisionError


def units_of(net: Net) -> list[tuple[str, list[nn.Module]]]:
    return [(f"blocks.{i}", [b]) for i, b in enumerate(net.blocks)]


def failing_forward(model: Sharded, x: Tensor) -> None:
    with suppress(ZeroDivisionError):
        model(x, fails_at=2)


def interrupted_forward(model: Sharded, x: Tensor) -> None:
    # torch calls no hook then: it catches nothing but `Exception`
    with suppress(KeyboardInterrupt):
        model(x, fails_at=2, error=KeyboardInterrupt)


def failing_backward(model: Sharded, x: Tensor) -> None:
    with suppress(ZeroDivisionError):
        model(x, backward_fails_at=2).backward()


def evaluation(model: Sharded, x: Tensor) -> None:
    model.module.eval()
    with torch.no_grad():
        first = float(model(x))
    with torch.inference_mode():
        assert float(model(x)) == first
    model.module.train()
    assert float(model(x)) == first, "a forward that is never followed by its backward"


def held(model: Sharded, x: Tensor) -> None:
    with model.no_sync():
        model(x).backward()


def step(model: Sharded, x: Tensor) -> None:
    model(x).backward()


def input_gradient(model: Sharded, x: Tensor) -> None:
    before = model.grad.clone()
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x), x)
    assert float(grad.norm()) > 0 and torch.equal(model.grad, before)


EVENTS: dict[str, Callable[[Sharded, Tensor], None]] = {
    f.__name__: f
    for f in (
        failing_forward,
        interrupted_forward,
        failing_backward,
        evaluation,
        held,
        step,
        input_gradient,
    )
}


def weights_after(event: str) -> list[np.ndarray]:
    """This rank's weights after two steps of two micro-batches: as they are, and with the event
    before zero_grad, and before each micro-batch where it leaves no gradients.
    """
    mesh = make_mesh()
    f64 = torch.float64
    out = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        net = Net().double()
        model = shard(net, units_of(net), mesh, param_dtype=f64, master_dtype=f64, reduce_dtype=f64)
        optimizer = AdamW(model, AdamWOptions())
        clean = event in ("failing_forward", "evaluation", "input_gradient")
        for pair in torch.randn(
            2, 2, 3, D, dtype=f64, generator=torch.Generator().manual_seed(mesh.rank)
        ):
            if disturbed:
                EVENTS[event](model, pair[0])
            model.zero_grad()
            for x in pair:
                if disturbed and clean:
                    EVENTS[event](model, x)
                model(x).backward()
            optimizer.step(1e-2)
        out.append(model.master.numpy())
    return out


@pytest.mark.parametrize("event", EVENTS)
def test_a_step_is_the_same_after(event: str) -> None:
    for plain, disturbed in run_ranks(weights_after, 2, event):
        np.testing.assert_array_equal(disturbed, plain)


def three_replicas() -> list[np.ndarray]:
    """Gradients of a step on replicas: finished twice, by the optimizer alone, held throughout, and in a
    backward known as the last.
    """
    mesh = make_mesh(fsdp_size=1)
    out = []
    for how in ("finished twice", "by the optimizer", "held", "last"):
        torch.manual_seed(0)
        net = Net()
        model = shard(net, units_of(net), mesh, param_dtype=torch.float32)
        optimizer = AdamW(model, AdamWOptions(clip_grad=0))
        x = torch.randn(3, D, generator=torch.Generator().manual_seed(mesh.rank))
        if how == "held":
            with model.no_sync():
                model(x).backward()
        elif how == "last":
            with model.last_backward():
                model(x).backward()
            with pytest.raises(
                RuntimeError, match="only the last one of a step into last_backward"
            ):
                model(x).backward()
        else:
            model(x).backward()
        if how == "finished twice":
            model.finish_gradients()
            model.finish_gradients()
        optimizer.step(0.0)
        out.append(model.grad.numpy())
        with pytest.raises(RuntimeError, match="call zero_grad before"):
            model(x).backward()
    return out


def test_gradients_of_replicas_are_added_once() -> None:
    grads = [g for rank in run_ranks(three_replicas, 3) for g in rank]
    assert np.abs(grads[0]).sum() > 0
    for found in grads[1:]:
        np.testing.assert_array_equal(found, grads[0])


def all_held() -> np.ndarray:
    """Gradients of two held micro-batches and none after them, on two shards."""
    torch.manual_seed(0)
    net = Net()
    model = shard(net, units_of(net), make_mesh(), param_dtype=torch.float32)
    with model.no_sync():
        for _ in range(2):
            model(torch.ones(3, D)).backward()
    assert not model.grad.any()
    model.finish_gradients()
    return model.grad.numpy()


def test_what_is_held_at_the_end_of_a_step_is_reduced() -> None:
    torch.manual_seed(0)
    net = Net()
    net(torch.ones(3, D)).backward()
    gradient = net.blocks[4].linear.bias.grad
    assert gradient is not None
    # A unit: 256 weights, 128 for 16 biases
    found = np.concatenate([rank.reshape(5, -1)[4] for rank in run_ranks(all_held, 2)])
    np.testing.assert_allclose(found[D * D : D * D + D], 4 * gradient.numpy(), rtol=1e-5)


# ── what is refused
# ─────────────────────────────────────────────────────────────────────────────────────────────


def shared() -> Sharded:
    net = Net()
    net.blocks[3].linear.weight = net.blocks[0].linear.weight
    return shard(net, units_of(net), make_mesh())


def shared_outside() -> Sharded:
    net = nn.ModuleDict({"embed": nn.Embedding(D, D), "head": nn.Linear(D, D, bias=False)})
    net["head"].weight = net["embed"].weight
    return shard(net, [("embed", [net["embed"]])], make_mesh())


def container() -> Sharded:
    net = Net()
    return shard(net, [("blocks", [net.blocks])], make_mesh())


def foreign() -> Sharded:
    net = Net()
    return shard(net, [*units_of(net), ("more", [nn.Linear(2, 2)])], make_mesh())


def repeated() -> Sharded:
    net = Net()
    return shard(net, [*units_of(net), ("again", [net.blocks[1]])], make_mesh())


def integers() -> Sharded:
    net = Net()
    net.blocks[0].table = nn.Parameter(torch.arange(3), requires_grad=False)
    return shard(net, units_of(net), make_mesh())


def sharded_already() -> Sharded:
    net = Net()
    shard(net, units_of(net), make_mesh())
    return shard(net, [("all", [net])], make_mesh())


REFUSED = {
    sharded_already: r"blocks\.0\.linear\.weight is of a module that was sharded already: shard it once, with all its units",
    shared: r"blocks\.0\.linear\.weight of unit 'blocks\.0' is used by unit 'blocks\.3' too.*put all modules that share it in one unit",
    shared_outside: r"embed\.weight of unit 'embed' is used by module 'head', which is in no unit too",
    container: r"unit 'blocks': 'blocks' is a ModuleList, which is never called itself.*give the modules in it",
    foreign: r"unit 'more' has a Linear that isn't in the module",
    repeated: r"module 'blocks\.1' is in `units` more than once: name it once",
    integers: r"blocks\.0\.table is torch\.int64.*make it a buffer",
}


@pytest.mark.parametrize("build", REFUSED, ids=lambda f: f.__name__)
def test_refused_when_sharded(build: Callable[[], Sharded]) -> None:
    with pytest.raises(ValueError, match=REFUSED[build]):
        build()


class Hidden:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Odd(nn.Module):
    """Ways of using a unit that can't be seen from outside of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(_OddBlock(how) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if self.how == "not called":
                x = block.forward(x)
            elif self.how == "inside" and i == 0:
                x = block(x, self.blocks[2])
            else:
                x = block(x)
            x = x.x if isinstance(x, Hidden) else x
        return x.square().sum()


class _OddBlock(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(D, D)

    def forward(self, x: Tensor, inner: nn.Module | None = None) -> object:
        x = self.linear(x if inner is None else inner(x))
        return {"hidden": Hidden(x), "own": self.linear.weight[:1]}.get(self.how, x)


def odd(how: str) -> str:
    net = Odd(how)
    model = shard(
        net,
        [(f"blocks.{i}", [b]) for i, b in enumerate(net.blocks)],
        make_mesh(),
        param_dtype=torch.float32,
    )
    loss = model(torch.ones(2, D))
    if how == "stale":
        model.refresh()
    torch.autograd.grad(
        loss, net.blocks[0].linear.weight, create_graph=True
    ) if how == "twice" else loss.backward()
    model.finish_gradients()
    return how


MISUSED = {
    "not called": "unit 'blocks.3' got gradients, but its weights were not gathered for them: call its module itself",
    "hidden": "unit 'blocks.3' got gradients, but its weights were not gathered for them",
    "own": "unit 'blocks.0' returns its own parameter, or a view of it, and others take its memory: return a clone",
    "stale": "the weights have changed since this forward",
    "twice": "a backward of the backward",
    "inside": "unit 'blocks.2' runs inside the forward of unit 'blocks.0'",
}


@pytest.mark.parametrize("how", [h for h in MISUSED if h != "inside"])
def test_refused_when_run(how: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=MISUSED[how].replace("blocks.3", r"blocks\.\d")):
        odd(how)


@pytest.mark.parametrize("how", ["inside", "hidden"])
def test_refused_on_two_ranks(how: str) -> None:
    with pytest.raises(AssertionError, match=MISUSED[how].replace("blocks.3", r"blocks\.\d")):
        run_ranks(seeded, 2, how)


def seeded(how: str) -> str:
    torch.manual_seed(0)
    return odd(how)


def unlike() -> str:
    torch.manual_seed(make_mesh().rank)
    net = Net()
    with pytest.raises(
        ValueError,
        match=r"blocks\.0\.linear\.weight has other values on another rank: seed all ranks alike",
    ):
        shard(net, units_of(net), make_mesh())
    return "refused"


def test_ranks_that_start_from_other_weights_are_refused() -> None:
    assert run_ranks(unlike, 2) == ["refused"] * 2


def test_freezing_after_sharding_is_refused() -> None:
    net = Net()
    model = shard(net, units_of(net), make_mesh())
    optimizer = AdamW(model, AdamWOptions())
    net.blocks[2].requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"blocks\.2\.linear\.weight was frozen after sharding.*do it before `shard`",
    ):
        optimizer.step(1e-3)
