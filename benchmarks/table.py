"""What the kernel benchmarks share: timing with device events, the hardware line, the table, `--json`."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from retool.perf import GIB


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="save the lines here")
    return parser


def hardware(device: torch.device) -> str:
    """One line: the device and the versions that decide its speed."""
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device), f"torch {torch.__version__}", f"cuDNN {torch.backends.cudnn.version()}"]
    else:
        parts = [f"CPU {platform.machine()}, {torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    for package in ("flash-attn", "triton"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def measure(run: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds of each of `repeats` runs after two for warming up, and the memory they needed on top (GiB; NaN on the CPU)."""
    for _ in range(2):
        run()
    if device.type != "cuda":
        ms = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            ms.append(1e3 * (time.perf_counter() - start))
        return {"ms": ms, "gib": float("nan")}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    ms = [a.elapsed_time(b) for a, b in pairwise(events)]
    return {"ms": ms, "gib": (torch.cuda.max_memory_allocated() - before) / GIB}


def spread(ms: list[float]) -> str:
    """median (lowest … highest) in milliseconds"""
    return f"{statistics.median(ms):.2f} ({min(ms):.2f} … {max(ms):.2f})"


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A Markdown table: the first column is text, the others numbers."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def save(path: Path | None, device: torch.device, lines: list[dict[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps({"hardware": hardware(device), "lines": lines}, indent=1))
