"""What the benchmarks share: timing with device events, the hardware line, tables that print and
save row by row, rows that fail.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from retool.perf import GIB


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="save the lines here")
    return parser


def some_of(known: Iterable[str]) -> Callable[[str], str]:
    """argparse's `type` of names with commas between them: one that isn't known is refused before
    anything is measured.
    """
    names = tuple(known)

    def checked(text: str) -> str:
        for name in filter(None, text.split(",")):
            if name not in names:
                raise argparse.ArgumentTypeError(f"no {name!r} here; any of {', '.join(names)}")
        return text

    return checked


def hardware(device: torch.device) -> str:
    """One line: the device and the versions that decide its speed."""
    if device.type == "cuda":
        parts = [
            torch.cuda.get_device_name(device),
            f"torch {torch.__version__}",
            f"cuDNN {torch.backends.cudnn.version()}",
        ]
    else:
        parts = [
            f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
            f"torch {torch.__version__}",
        ]
    for package in ("flash-attn", "triton"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def measure(run: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds of each of `repeats` runs after two for warming up, and the memory they needed
    on top (GiB; NaN on the CPU).
    """
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


def head(title: str, columns: Sequence[str]) -> None:
    """A Markdown table's title and first lines: the first column is text, the others numbers."""
    print(
        f"\n{title}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}", flush=True
    )


def row(cells: Sequence[str]) -> None:
    """A table's next row."""
    print(f"| {' | '.join(cells)} |", flush=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A whole table."""
    head(title, columns)
    for cells in rows:
        row(cells)


def save(path: Path | None, device: torch.device, lines: Sequence[dict[str, Any]]) -> None:
    """What there is so far; whoever is killed meanwhile leaves what was saved before."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"hardware": hardware(device), "lines": lines}, indent=1))
        part.replace(path)


# --- rows that fail ---


@cache
def _gloo(world: Any, patience: float) -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))


def attempt(make: Callable[[], dict[str, Any]], patience: float = 60) -> dict[str, Any]:
    """The line that `make` returns, or {"failed": why}: a row that can't be measured doesn't cost
    the others.

    In a job of several ranks a collective call, the same on all of them: where one failed, the row
    has. RuntimeError when a rank isn't through `patience` seconds after this one: it waits for what
    will never come, and the job had better end.
    """
    try:
        line = make()
    except Exception as error:
        line = {"failed": f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]}
    if dist.is_initialized():
        group = _gloo(dist.group.WORLD, patience)
        reasons: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, line.get("failed"), group=group)
        if failed := [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why]:
            line = {"failed": failed[0]}
    if "failed" in line:
        gc.collect()  # what it had on the device
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return line


def failed(name: str, line: dict[str, Any], columns: int) -> list[str]:
    """The cells of a row that failed."""
    return [name, f"failed: {line['failed']}".replace("|", "/"), *[""] * (columns - 2)]
