"""How fast it goes: peak FLOP/s of a device and MFU, a step timer, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

GIB = 1024**3

# Dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets; the longest name that the device's
# name contains counts.
PEAK_FLOPS: Mapping[str, float] = {
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of the device with this name (`torch.cuda.get_device_name`); None when
    unknown.
    """
    words = name.replace("-", " ").split()
    fits = [known for known in PEAK_FLOPS if _holds(words, known.split())]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None


def _holds(words: list[str], part: list[str]) -> bool:
    return any(words[i : i + len(part)] == part for i in range(len(words)))


def device_peak(device: torch.device) -> float | None:
    """`peak_flops` of a torch device; None for the CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def mfu(flops: float, seconds: float, gpus: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of the peak of `gpus` devices that `flops` in `seconds`
    is. None without a peak.
    """
    return None if peak is None or seconds <= 0 else flops / seconds / (gpus * peak)


def peak_memory(device: torch.device) -> tuple[float, float]:
    """Peak (allocated, reserved) GiB since the process began.

    On the CPU both are the process's largest resident size.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(
            device
        ) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB on Linux
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return resident, resident


class StepTimer:
    """Seconds of a step and its phases, on the device's clock, without holding the host back.

    On CUDA a phase is a pair of events on the current stream: it costs the host nothing, and `take`
    may be read a step later, when the events have long passed. On the CPU it is the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._phases: list[tuple[str, Any, Any]] = []
        self.current = ""  # the phase that the host is in
        self._start = self._mark()

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside; the same name again adds up."""
        start = self._mark()
        outer = self.current
        self.current = name
        try:
            yield
        finally:
            self._phases.append((name, start, self._mark()))
            self.current = outer

    def take(self) -> StepTimes:
        """End the step here and begin the next."""
        end = self._mark()
        times = StepTimes((*self._phases, ("step", self._start, end)), self._cuda)
        self._phases = []
        self._start = end
        return times


@dataclass(frozen=True)
class StepTimes:
    """A step's marks. Read it late: `seconds` waits for the step's end on the device."""

    marks: tuple[tuple[str, Any, Any], ...]
    cuda: bool

    def seconds(self) -> dict[str, float]:
        """Phase → seconds, `step` among them."""
        if self.cuda:
            self.marks[-1][2].synchronize()
        out: dict[str, float] = {}
        for name, start, end in self.marks:
            out[name] = out.get(name, 0.0) + (
                start.elapsed_time(end) / 1000 if self.cuda else end - start
            )
        return out
