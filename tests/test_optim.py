"""Schedules against transformers' and their formulas; what the update touches, and what it leaves
alone; loss scaling in fp16.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from retool import optim
from retool.optim import AdamW, AdamWOptions, LossScale, learning_rate, trainable_stretches
from retool.parallel.fsdp import shard
from retool.parallel.mesh import make_mesh
from tests.parallel.layouts import reshard


def rates(total: int, **more: object) -> list[float]:
    return [learning_rate(step, total, 2.0, **more) for step in range(total)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("total", "ratio"), [(100, 0.1), (37, 0.0), (7, 0.5), (5, 0.1)])
def test_cosine_is_transformers_but_for_the_warm_up(total: int, ratio: float) -> None:
    """Theirs begins at 0; ours, as the reference, at peak / warmup, and reaches the peak a step
    earlier.
    """
    warmup = int(total * ratio)
    theirs = get_cosine_schedule_with_warmup(
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0), warmup, total
    ).lr_lambdas[0]
    found = rates(total, warmup_ratio=ratio)
    assert found[:warmup] == pytest.approx([2.0 * (s + 1) / warmup for s in range(warmup)])
    assert found[warmup:] == pytest.approx([2.0 * theirs(s) for s in range(warmup, total)])


def test_the_floor_of_the_schedules() -> None:
    lowest = rates(1000, min_ratio=0.25)[-1]
    assert 0.5 < lowest < 0.501 and rates(1000)[-1] < 1e-4
    assert learning_rate(5000, 1000, 2.0) == 0.0, "after the end it stays down"


def test_wsd_is_constant_until_the_last_tenth() -> None:
    found = rates(100, kind="wsd", warmup_ratio=0.2)
    assert (
        found[:20] == pytest.approx([2.0 * (s + 1) / 20 for s in range(20)])
        and found[20:91] == [2.0] * 71
    )
    assert found[91:] == pytest.approx([2.0 * k / 10 for k in range(9, 0, -1)])


@pytest.mark.parametrize("total", [2, 3, 9, 10, 19, 20])
def test_wsd_of_few_steps_ends_below_its_peak(total: int) -> None:
    """A tenth of fewer than 20 steps is one at most, and a stretch of one begins at the peak."""
    assert rates(total, kind="wsd", warmup_ratio=0) == [2.0] * (total - 1) + [1.0]


def test_wsd_begins_at_its_peak_however_long_the_warm_up() -> None:
    found = rates(100, kind="wsd", warmup_ratio=0.95)
    assert found[94:] == pytest.approx([2.0, 2.0, 1.6, 1.2, 0.8, 0.4])
    assert rates(1, kind="wsd") == [2.0], "a single step is trained at the peak, as cosine's is"


def test_constant_and_unknown() -> None:
    assert rates(10, kind="constant", warmup_ratio=0.3) == pytest.approx([2 / 3, 4 / 3, *[2.0] * 8])
    with pytest.raises(
        ValueError, match=r"optim\.lr_scheduler='cosin' is unknown\. Use cosine, wsd or constant"
    ):
        learning_rate(9, 10, 1.0, "cosin")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(20, 30) for _ in range(3))


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(
    "frozen", [(), ("blocks.1.weight",), ("blocks.0.bias", "blocks.1.weight", "blocks.2.bias")]
)
def test_runs_are_all_that_is_trainable_and_nothing_else(
    shards: int, frozen: tuple[str, ...]
) -> None:
    net = Net()
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    units = [(f"{i}", [block]) for i, block in enumerate(net.blocks)]
    layout = reshard(shard(net, units, make_mesh()).layout, shards)
    seen = dict.fromkeys((slot.name for unit in layout.units for slot in unit.slots), 0)
    for rank in range(shards):
        runs = trainable_stretches(layout, rank)
        assert all(a < b for a, b in runs) and all(b < c for (_, b), (c, _) in pairwise(runs)), (
            "apart, in order"
        )
        for unit in layout.units:
            for slot in unit.slots:
                low = unit.start + slot.offset - rank * unit.shard_numel
                inside = range(
                    max(low, unit.start), min(low + slot.numel, unit.start + unit.shard_numel)
                )
                seen[slot.name] += sum(a <= i < b for i in inside for a, b in runs)
    assert seen == {
        name: 0 if name in frozen else {"weight": 600, "bias": 30}[name.split(".")[-1]]
        for name in seen
    }
    if not frozen:
        assert trainable_stretches(layout, 0) == [(0, layout.shard_numel)], (
            "one kernel for everything"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [0.0, 0.1, 1e9])
def test_clipping_and_decay(dtype: torch.dtype, clip: float) -> None:
    """Five steps as torch's clip and AdamW make them."""
    torch.manual_seed(0)
    net = nn.Linear(9, 5).to(dtype)
    x = torch.randn(4, 9, dtype=dtype)
    theirs = nn.Linear(9, 5).to(dtype)
    theirs.load_state_dict(net.state_dict())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    model = shard(
        net,
        [("all", [net])],
        make_mesh(),
        param_dtype=dtype,
        master_dtype=dtype,
        reduce_dtype=dtype,
    )
    optimizer = AdamW(model, AdamWOptions(betas=(0.8, 0.9), weight_decay=0.3, clip_grad=clip))
    for _ in range(5):
        model.zero_grad()
        model(x).square().sum().backward()
        norm, _ = optimizer.step(0.1)
        reference.zero_grad()
        theirs(x).square().sum().backward()
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), clip or 1e12)
        reference.step()
        assert float(norm) == pytest.approx(float(wanted), rel=1e-5)
    for found, want in zip(net.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)


def test_the_loss_scale_follows_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "FINITE_STEPS_TO_DOUBLE", 3)
    scale = LossScale(torch.float16, torch.device("cpu"))
    seen = []
    for skipped in (1, 0, 0, 1, 0, 0, 0, 0, 0, 0):
        scale.update(torch.tensor(float(skipped)))
        seen.append(float(scale.value))
    assert [value / 2**16 for value in seen] == [
        0.5,
        0.5,
        0.5,
        0.25,
        0.25,
        0.25,
        0.5,
        0.5,
        0.5,
        1.0,
    ]
    for _ in range(20):
        scale.update(torch.tensor(1.0))
    assert float(scale.value) == 1 and float(scale.scaled(torch.tensor(3.0))) == 3


def test_a_loss_scale_goes_on_where_it_was() -> None:
    first, second = (LossScale(torch.float16, torch.device("cpu")) for _ in range(2))
    for skipped in (1.0, 0.0, 0.0):
        first.update(torch.tensor(skipped))
    second.restore(first.state())
    assert first.state() == second.state() == {"loss_scale": [2.0**15, 2.0]}
    wide = LossScale(torch.bfloat16, torch.device("cpu"))
    wide.update(torch.tensor(1.0))
    wide.restore(first.state())
    loss = torch.ones(())
    assert wide.state() == {} and wide.scaled(loss) is loss and float(wide.value) == 1


@pytest.mark.parametrize("clip", [0.0, 1e-9])
def test_gradients_too_small_for_fp16_arrive(clip: float) -> None:
    """Of 1e-8, less than fp16's least number: updates and norms as in fp32."""
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)).half()
    results = []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        net = nn.Linear(9, 5)
        start = net.weight.detach().clone()
        model = shard(net, [("all", [net])], make_mesh(), param_dtype=dtype)
        optimizer = AdamW(model, AdamWOptions(clip_grad=clip, weight_decay=0.0, eps=1e-12))
        model.zero_grad()
        optimizer.loss_scale.scaled(model(x.to(dtype)).float().sum() * 1e-8).backward()
        norm, skipped = optimizer.step(0.1)
        assert not skipped
        results.append((float(norm), model.master[: start.numel()].view_as(start) - start))
    (norm, moved), (wanted, reference) = results
    assert norm == pytest.approx(wanted, rel=1e-2) and wanted < 1e-6
    torch.testing.assert_close(moved, reference, rtol=2e-2, atol=1e-5)


def test_a_gradient_that_overflows_halves_the_loss_scale_and_changes_nothing_else() -> None:
    net = nn.Linear(9, 5)
    model = shard(net, [("all", [net])], make_mesh(), param_dtype=torch.float16)
    optimizer = AdamW(model, AdamWOptions())
    before = model.master.clone()
    model.zero_grad()
    optimizer.loss_scale.scaled(
        model(torch.ones(4, 9).half()).float().sum()
    ).backward()  # 4 · 2^16 > 65,504
    norm, skipped = optimizer.step(0.1)
    assert skipped and not torch.isfinite(norm) and float(optimizer.loss_scale.value) == 2**15
    assert torch.equal(model.master, before) and float(optimizer.steps) == 0
