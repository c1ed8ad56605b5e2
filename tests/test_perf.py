"""Peaks, MFU, the timer."""

from __future__ import annotations

import time

import pytest
import torch

from retool.perf import StepTimer, mfu, peak_flops, peak_memory


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_mfu() -> None:
    assert mfu(989e12, 2.0, 2, 989e12) == pytest.approx(0.25)
    assert mfu(1e12, 1.0, 1, None) is None


def test_timer_on_the_cpu() -> None:
    timer = StepTimer(torch.device("cpu"))
    with timer.phase("data"):
        time.sleep(0.02)
    with timer.phase("data"):
        time.sleep(0.02)
    first = timer.take()
    time.sleep(0.01)
    second = timer.take()
    seconds = first.seconds()
    assert 0.04 <= seconds["data"] <= seconds["step"] < 20
    assert set(second.seconds()) == {"step"} and second.seconds()["step"] >= 0.01


def test_peak_memory_of_the_process() -> None:
    """Counted in GiB: a GiB filled shows as one."""
    device = torch.device("cpu")
    before, _ = peak_memory(device)
    filled = torch.ones(64 << 20)  # 256 MiB
    after, same = peak_memory(device)
    assert after == same and 0.05 < after < 200 and after >= before
    assert filled.numel() == 64 << 20


@pytest.mark.gpu
def test_timer_and_memory_on_the_gpu() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.init()  # before that there are no statistics to reset
    torch.cuda.reset_peak_memory_stats(device)
    timer = StepTimer(device)
    a = torch.randn(4096, 4096, device=device)
    with timer.phase("forward_backward"):
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
    times = timer.take().seconds()
    assert 0 < times["forward_backward"] <= times["step"] + 1e-4
    allocated, reserved = peak_memory(device)
    assert 0.06 < allocated <= reserved
