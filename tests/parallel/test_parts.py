"""Gradients that leave a rank in bf16 and are added up in fp32 where they arrive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from retool.parallel.collectives import send_parts
from retool.parallel.fsdp import shard
from retool.parallel.fsdp.overlap import Overlap, Pending, add_parts
from retool.parallel.mesh import make_mesh
from tests.interpreter import interpreted
from tests.ranks import run_ranks

RANKS = 4
NUMEL = 128  # of a part


def drawn(rank: int) -> torch.Tensor:
    """What a rank sends: numbers whose sum depends on how it is rounded."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(RANKS * NUMEL, generator=generator) * 10.0**rank).bfloat16()


def summed(rank: int, start: torch.Tensor) -> torch.Tensor:
    """`start` and the rank's parts of all, by torch's own sum in fp32, rank after rank."""
    parts = [drawn(other).view(RANKS, NUMEL)[rank].float() for other in range(RANKS)]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total = total + part
    return start + total


def exchanged() -> list[list[float]]:
    """What this rank's sum should be, and is, of what counts as small and as large."""
    mesh = make_mesh()
    assert mesh.shard_group is not None
    start = torch.linspace(-1, 1, NUMEL)
    found = [summed(mesh.rank, start)]
    for large in (1 << 20, 1):
        flat = drawn(mesh.rank)
        received = torch.full_like(flat, float("nan"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("retool.parallel.collectives.LARGE_BYTES", large)
            for work in send_parts(received, flat, mesh.shard_group):
                work.wait()
        into = start.clone()
        add_parts(into, flat, received, mesh.rank)
        found.append(into)
    return [each.tolist() for each in found]


def test_parts_are_added_up_in_fp32() -> None:
    for want, small, large in run_ranks(exchanged, RANKS):
        assert small == want and large == want


def ways() -> list[str]:
    """How gradients leave, of a micro-batch alone, and of two of which the first is held; on one
    machine, and where each rank has its own.
    """
    found = list[str]()
    reduce = Overlap.reduce
    reduce_parts = Overlap.reduce_parts

    def noted(*args: object) -> object:
        found.append("fp32")
        return reduce(*args)  # type: ignore[arg-type]

    def noted_parts(*args: object) -> object:
        found.append("bf16")
        return reduce_parts(*args)  # type: ignore[arg-type]

    for machine in ("2", "1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", machine)
            patch.setattr(Overlap, "reduce", noted)
            patch.setattr(Overlap, "reduce_parts", noted_parts)
            net = nn.Linear(8, 8)
            model = shard(net, [("all", [net])], make_mesh())
            x = torch.ones(2, 8, dtype=torch.bfloat16)
            for held in (False, True, False):
                with model.no_sync() if held else nullcontext():
                    model(x).sum().backward()
    return found


class Branches(nn.Module):
    """The loss may leave one of two out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        first = self.first(x)
        second = self.second(x)
        return (first + second if both else second).sum()


def held_by_one() -> list[str]:
    """How gradients leave that only the first rank has held."""
    ways = list[str]()

    def noted(way: str) -> Callable[..., Pending]:
        return lambda *_: ways.append(way) or Pending()

    net = Branches()
    model = shard(net, [("first", [net.first]), ("second", [net.second])], make_mesh())
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Overlap, "reduce", noted("fp32"))
        patch.setattr(Overlap, "reduce_parts", noted("bf16"))
        with model.no_sync():
            model(x, both=model.mesh.rank == 0).backward()
        model(x, both=True).backward()
        model.zero_grad()
        model(x, both=True).backward()
    return ways


def test_ranks_agree_on_how_gradients_leave_that_some_have_held() -> None:
    assert run_ranks(held_by_one, 2) == [["fp32", "fp32", "bf16", "bf16"]] * 2


def test_gradients_leave_in_bf16_inside_a_machine_unless_they_were_held() -> None:
    assert run_ranks(ways, 2) == [["bf16", "fp32", "fp32", "fp32"]] * 2


def compare(device: str = "cpu") -> None:
    """The kernel against torch's sums, to the bit."""
    from retool.parallel.fsdp import sum_triton

    for rank in range(RANKS):
        for dtype in (torch.bfloat16, torch.float16):
            sent = [drawn(other).clamp(-6e4, 6e4).to(dtype) for other in range(RANKS)]
            received = torch.cat([one.view(RANKS, NUMEL)[rank] for one in sent])
            # Its own part is read where it was sent from
            received[rank * NUMEL : (rank + 1) * NUMEL] = float("nan")
            into = torch.linspace(-1, 1, NUMEL)
            found = into.to(device)
            sum_triton.add_parts(found, sent[rank].to(device), received.to(device), rank)
            add_parts(into, sent[rank], received, rank)
            assert torch.equal(found.cpu(), into)


@pytest.mark.slow
def test_the_kernel_interpreted() -> None:
    pytest.importorskip("triton")
    interpreted("tests.parallel.test_parts")


@pytest.mark.gpu
def test_the_kernel_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    compare("cuda")
