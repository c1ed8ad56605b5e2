"""What sharding takes is what is written: state and buffers to the byte, and the peak of a step to
the last tensor.

P parameters over S shards in L units of U = D², B rows of D; bf16 compute, fp32 master, gradients
and reduction.

    state      P/S · (4 master + 2 what is gathered + 4 gradient + 8 moments)
    buffers    2 · U · (2 weights + 4 gradients): two units, whatever L
    activations in the last unit's backward: L - 1 inputs and the gradient of its own, L · B·D·2
    gradients  of its weights 2·U; their sum, 4·U/S, comes when its input B·D·2 has gone

The collectives do nothing here, and the streams are those of tests/parallel/streams.py: CUDA's code
path, without its allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import shard
from retool.parallel.mesh import make_mesh
from tests.parallel.streams import watched

L = 6
D = 128
B = 64
U = D * D
P = L * D * D


class Live(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are there still, and the most there
    were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        self.storages = {
            key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()
        }
        return sum(size for _, size in self.storages.values())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(L))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return x.sum()


def taken(shards: int, more: dict[str, Any], hold: bool) -> dict[str, int]:
    """Bytes: planned, there after sharding, with the optimizer before the second step, and at the
    most in that step's two phases.
    """
    net = Stack()
    x = torch.ones(B, D, dtype=torch.bfloat16)
    with watched(), Live() as live:
        model = shard(
            net,
            [(f"{i}", [u]) for i, u in enumerate(net.units)],
            make_mesh(fsdp_size=shards),
            **more,
        )
        found = {"planned": model.planned_bytes(), "sharded": live.bytes()}
        optimizer = AdamW(model, AdamWOptions())
        for _ in range(2):
            model.zero_grad()
            found["before"] = live.peak = live.bytes()
            for number in range(2):
                with model.no_sync() if hold and number == 0 else nullcontext():
                    model(x).backward()
            found["backward"], live.peak = live.peak, live.bytes()
            optimizer.step(1e-3)
            found["optimizer"] = live.peak
    return found


@pytest.fixture(params=[(2, 2), (8, 8), (8, 4)], ids=lambda p: f"{p[0]} ranks, {p[1]} shards")
def shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """One process that is rank 0 of several which aren't there."""
    world, shards = request.param
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    yield shards
    dist.destroy_process_group()


CASES: list[
    tuple[dict[str, Any], bool, Callable[[int], int]]
] = [  # options, whether gradients are held, what differs from the formula
    ({}, False, lambda _: 0),
    ({"reshard_after_forward": False}, False, lambda _: (L - 2) * U * 2),
    ({"keep_copy": False}, False, lambda shards: -P // shards * 2),
    ({"forward_prefetch": False, "backward_overlap": False}, False, lambda _: 0),
    ({"reduce_dtype": torch.bfloat16}, False, lambda _: -2 * U * 2),
    ({}, True, lambda _: P * 4),
]


@pytest.mark.parametrize(("more", "hold", "differs"), CASES)
def test_peak_is_the_formula(
    shards: int, more: dict[str, Any], hold: bool, differs: Callable[[int], int]
) -> None:
    found = taken(shards, more, hold)
    state = P // shards * (4 + 2 + 4) + 2 * U * (2 + 4) + differs(shards)
    assert found["planned"] == found["sharded"] == state - differs(shards) * hold
    before = state + P // shards * 8
    assert found["before"] - before == 12, "the optimizer counts its steps, and has a loss scale"
    summed = (2 if "reduce_dtype" in more else 4) * U // shards
    assert (
        found["backward"] - found["before"]
        == L * B * D * 2 + 2 * U + max(0, summed - B * D * 2) + 4
    ), "4: the loss"
    assert found["optimizer"] - found["before"] < 100, "the update is in place"
