"""Where the milliseconds of a step go: a profile's kernels, by what they are for.

`benchmarks/sft.py --profile FILE` prints such a table and writes every kernel to FILE (JSON).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

# The first that is found in a kernel's name: kernels of attention name cutlass too, and what the
# compiler makes is called after all it does, copies included
KINDS = {
    "communication": r"nccl",
    "attention": r"sdpa|flash|fmha|attention",
    "vocabulary head": r"_update_kernel|_gradient_kernel|^_scaled_kernel",
    "compiled elementwise": r"^triton_|^_turned_heads",
    "gated MLP, its elementwise half": r"^_gated_forward|^_gated_backward",
    "copies": r"memcpy|memset|catarray|copy",
    "matrix products": r"nvjet|gemm|cutlass|xmma|splitk",
}
REST = "everything else"


Interval = tuple[float, float]
Event = tuple[str, float, float]  # a name, when it started and when it ended, in milliseconds


def union(intervals: list[Interval]) -> list[Interval]:
    """Disjoint, sorted."""
    out: list[Interval] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def kind_of(name: str) -> str:
    """What a kernel is for, by its name."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))
    return next(found, REST)


def device_events(found: Any) -> list[Event]:
    """(name, start, end) of everything that ran on the device, in milliseconds."""
    events = list[Event]()
    for event in found.events() or []:
        on_device = str(event.device_type).endswith("CUDA")
        # Annotations cover kernels, and would be counted beside them
        if on_device and not event.name.startswith(("nccl:", "ProfilerStep", "Torch-Compiled")):
            events.append((event.name, event.time_range.start / 1e3, event.time_range.end / 1e3))
    return events


def breakdown(events: list[Event]) -> dict[str, Any]:
    """Milliseconds by kind and by kernel, and for how long nothing ran."""
    kinds = defaultdict[str, float](float)
    kernels = defaultdict[str, list[float]](lambda: [0.0, 0.0])
    for name, start, end in events:
        kinds[kind_of(name)] += end - start
        kernels[name][0] += end - start
        kernels[name][1] += 1
    spans = [(start, end) for _, start, end in events]
    window = max(end for _, end in spans) - min(start for start, _ in spans)
    by_time = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "window_ms": window,
        "idle_ms": window - length(union(spans)),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [{"name": name, "ms": ms, "calls": int(calls)} for name, (ms, calls) in by_time],
    }


def write(found: Any, path: Path, title: str) -> None:
    """The table on the console, every kernel in `path`."""
    shares = breakdown(device_events(found))
    path.write_text(json.dumps(shares, indent=1))
    print(
        f"\n{title}: one step, {shares['window_ms']:.0f} ms\n\n| | ms | of the step |\n|---|---:|---:|"
    )
    for kind, ms in [*shares["kinds"].items(), ("nothing runs", shares["idle_ms"])]:
        print(f"| {kind} | {ms:.1f} | {ms / shares['window_ms']:.1%} |")
