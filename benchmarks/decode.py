"""Where the milliseconds of a decode step go: each kernel beside its own limit, the gaps, the host.

    python benchmarks/decode.py [--shape qwen2.5-0.5b] [--at 256x960,32x8000] [--json out.json]
    python benchmarks/decode.py --shape tiny --at 4x24 --steps 3        a look at it on the CPU

*256x960*: 256 sequences of their own, decoding around 960 tokens. The engine runs as it always does
(graphs, steps that start ahead), with random weights and prompts. A row's *limit* is how long its
bytes take at the memory's nominal bandwidth, or its operations at the chip's nominal rate, whichever
is longer. A kernel that starts before the one ahead is over counts from that end. Products are known
by their order, elementwise kernels by the product before them. *Nothing runs*: between the kernels
of a step, and between steps. *Host*: what the engine's thread does in a step beside waiting for
draws.
"""

from __future__ import annotations

import re
import statistics
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import kernels
import numpy as np
import torch
from rollout import AS_RL, bandwidth, roofline_seconds, synchronised
from sft import SHAPES, random_weights
from table import arguments, attempt, failed, hardware, head, row, save

from retool.engine import Engine, EngineOptions, SamplingParams
from retool.engine.runner import Flight
from retool.model.build import build_decoder
from retool.model.config import ModelConfig
from retool.parallel.mesh import make_mesh
from retool.perf import device_peak

WARM_UP = 24  # steps after the prompts, before anything is measured
PRODUCTS = ["out of attention", "gate and up", "down"]  # in a layer, after its attention
AFTER = {
    "out of attention": "add, norm (to the MLP)",
    "gate and up": "SwiGLU",
    "down": "add, norm (to the next layer)",
}
ONCE = ("vocabulary", "draw")  # in a step; all other works are a layer's
ELEMENTWISE = ("compiled elementwise", "gated MLP, its elementwise half")
COLUMNS = ["", "calls a step", "µs each", "ms a step", "of the step", "limit, µs", "of its limit"]


@dataclass(frozen=True)
class Setting:
    """So many sequences, at about so many tokens."""

    rows: int
    tokens: int

    @property
    def title(self) -> str:
        return f"{self.rows} × {self.tokens:,}"


@dataclass(frozen=True)
class Work:
    """Bytes and operations of a call."""

    moved: float
    flops: float = 0.0

    def seconds(self, device: torch.device) -> float | None:
        """The longer of the two, at nominal rates; None where these aren't known."""
        per_second = bandwidth(device)
        peak = device_peak(device)
        if per_second is None or peak is None:
            return None
        return max(self.moved / per_second, self.flops / peak)


def work_of(config: ModelConfig, setting: Setting, size: int) -> dict[str, Work]:
    """Of each row of the table whose bytes follow from the shapes; numbers have `size` bytes."""
    rows = setting.rows
    c = config

    def product(inputs: int, outputs: int, out_size: int = size) -> Work:
        weights = inputs * outputs * size
        moved = weights + rows * (inputs * size + outputs * out_size)
        return Work(moved, 2.0 * rows * inputs * outputs)

    heads = c.query_width + 2 * c.key_width
    kept = rows * setting.tokens * 2 * c.key_width * size
    # The residual stream is in fp32: read and written; a product and a norm's result beside it
    add_norm = Work(rows * c.hidden * (2 * 4 + 2 * size))
    return {
        "attention": Work(kept, 4.0 * rows * setting.tokens * c.query_width),
        "q k v": product(c.hidden, heads),
        "out of attention": product(c.query_width, c.hidden),
        "gate and up": product(c.hidden, 2 * c.ffn),
        "down": product(c.ffn, c.hidden),
        "vocabulary": product(c.hidden, c.vocab, 4),
        "rope, cache": Work(rows * heads * 2 * size),
        "draw": Work(rows * c.vocab * 4),
        "SwiGLU": Work(rows * 3 * c.ffn * size),
        AFTER["out of attention"]: add_norm,
        AFTER["down"]: add_norm,
    }


def named(events: list[kernels.Event], layers: int) -> Iterator[tuple[str, kernels.Event]]:
    """What each kernel is for, in the order in which they ran."""
    layer = layers
    since = [*PRODUCTS, "vocabulary"]  # products since the last attention
    last = ""
    for event in sorted(events, key=lambda event: event[1]):
        name = event[0].lower()
        kind = kernels.kind_of(name)
        if "_attention_kernel" in name:
            layer = layer % layers + 1
            since = []
            last = "attention"
        elif "_joined_kernel" in name:
            last = "attention, parts joined"
        elif "_place_kernel" in name:
            last = "rope, cache"
        elif re.search(r"_mass_kernel|_draw_kernel|_cutoff_kernel", name):
            last = "draw"
        elif re.search(r"splitk\w*reduce|reduce\w*splitk", name):
            pass  # the product's before it
        elif kind == "matrix products":
            order = [*PRODUCTS, *["vocabulary"] * (layer == layers), "q k v"]
            last = order[len(since)] if len(since) < len(order) else "other products"
            since.append(last)
        elif kind in ELEMENTWISE:
            product = since[-1] if since else ""
            yield AFTER.get(product, "other elementwise"), event
            continue
        else:
            yield "copies and small kernels", event
            continue
        yield last, event


def own_times(events: list[kernels.Event]) -> list[tuple[str, float]]:
    """Milliseconds of each kernel beyond the end of those before: one that starts early only waits
    until then.
    """
    times = []
    over = float("-inf")
    for name, start, end in sorted(events, key=lambda event: event[1]):
        times.append((name, max(0.0, end - max(start, over))))
        over = max(over, end)
    return times


@contextmanager
def waiting_counted() -> Iterator[list[float]]:
    """Seconds that the engine's thread waits for draws."""
    waited = list[float]()
    read = Flight.read

    def timed(flight: Flight) -> np.ndarray:
        start = time.perf_counter()
        found = read(flight)
        waited.append(time.perf_counter() - start)
        return found

    with patch.object(Flight, "read", timed):
        yield waited


def decoding(config: ModelConfig, setting: Setting, args: Namespace) -> Engine:
    """An engine in which that many sequences decode."""
    steps = WARM_UP + 3 * args.steps
    prompt = max(1, setting.tokens - steps // 2)
    device = torch.device(args.device)
    model = build_decoder(config, make_mesh(device=args.device), AS_RL)
    random_weights(model)
    size = model.param_dtype.itemsize
    per_token = 2 * config.layers * config.key_width * size
    options = EngineOptions(
        max_num_seqs=setting.rows,
        kv_bytes=(setting.tokens + steps + 1024) * setting.rows * per_token,
        max_length=prompt + steps + 64,
        max_batch_tokens=max(8192, setting.rows),
    )
    engine = Engine(config, device, options)
    engine.sync(model)
    rng = np.random.default_rng(0)
    for i in range(setting.rows):
        ids = rng.integers(0, min(config.vocab, 150_000), prompt).tolist()
        params = SamplingParams(max_tokens=steps + 60, temperature=1.0, seed=(i,))
        engine.start(i, ids, params)
    while engine.stats.sampled_tokens < setting.rows * WARM_UP // 2:
        engine.step()
    for _ in range(WARM_UP // 2):
        engine.step()
    return engine


def measure(config: ModelConfig, setting: Setting, args: Namespace) -> dict[str, Any]:
    """A setting's line: seconds of its steps, and its kernels where there is a GPU."""
    engine = decoding(config, setting, args)
    device = engine.device
    seconds = []
    with waiting_counted() as waited:
        for _ in range(args.steps):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
    middle = statistics.mean(seconds)
    dtype = engine.weights.dtype
    assert dtype is not None
    line: dict[str, Any] = {
        "setting": setting.title,
        "step_ms": 1e3 * middle,
        "host_ms": 1e3 * (sum(seconds) - sum(waited)) / args.steps,
        "rows": [],
    }
    per_second = bandwidth(device)
    if per_second is not None:
        contexts = [setting.tokens] * setting.rows
        line["limit_ms"] = 1e3 * roofline_seconds(config, contexts, dtype.itemsize, per_second)
    if device.type == "cuda":
        line |= profiled(engine, work_of(config, setting, dtype.itemsize), args.steps)
    engine.release()
    return line


def profiled(engine: Engine, work: dict[str, Work], steps: int) -> dict[str, Any]:
    """Rows of the table, and how long nothing runs."""
    from torch.profiler import ProfilerActivity, profile

    synchronised(engine.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            engine.step()
        synchronised(engine.device)
    events = kernels.device_events(found)
    times = defaultdict[str, list[float]](list)
    names = defaultdict[str, set[str]](set)
    known = named(events, engine.config.layers)
    for (what, _), (name, milliseconds) in zip(known, own_times(events), strict=True):
        times[what].append(1e3 * milliseconds)
        names[what].add(name)
    rows = []
    for what, taken in sorted(times.items(), key=lambda item: -sum(item[1])):
        limit = work[what].seconds(engine.device) if what in work else None
        rows.append(
            {
                "what": what,
                "calls": len(taken) / steps,
                "us": statistics.median(taken),
                "ms": sum(taken) / 1e3 / steps,
                "limit_us": None if limit is None else 1e6 * limit,
                "works": 1 if what in ONCE else engine.config.layers,
                "names": sorted(names[what]),
            }
        )
    shares = kernels.breakdown(events)
    return {
        "rows": rows,
        "idle_ms": shares["idle_ms"] / steps,
        "window_ms": shares["window_ms"] / steps,
    }


def show(line: dict[str, Any]) -> None:
    """A setting's table."""
    limit = line.get("limit_ms")
    share = f", {limit / line['step_ms']:.1%} of the roofline" if limit else ""
    title = f"{line['setting']}: a step {line['step_ms']:.2f} ms{share}; host {line['host_ms']:.2f}"
    head(title, COLUMNS)
    whole = line.get("window_ms", line["step_ms"])
    for entry in line["rows"]:
        row(in_table(entry, whole))
    if "idle_ms" in line:
        idle = line["idle_ms"]
        row(["nothing runs", "", "", f"{idle:.3f}", f"{idle / whole:.1%}", "", ""])
    row(["a step", "", "", f"{whole:.3f}", "", f"{1e3 * limit:.0f}" if limit else "", ""])


def in_table(entry: dict[str, Any], whole: float) -> list[str]:
    limit = entry["limit_us"]
    each = 1e3 * entry["ms"] / entry["calls"]
    # Several kernels may do one work together: its limit is all of theirs
    together = 1e3 * entry["ms"] / entry["works"]
    return [
        entry["what"],
        f"{entry['calls']:.1f}",
        f"{each:.1f}",
        f"{entry['ms']:.3f}",
        f"{entry['ms'] / whole:.1%}",
        "" if limit is None else f"{limit:.1f}",
        "" if limit is None else f"{limit / together:.0%}",
    ]


def parse() -> Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--at", default="256x960,32x8000", help="sequences x tokens, …")
    parser.add_argument("--steps", type=int, default=24, help="measured, and profiled")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    print(hardware(device))
    lines = list[dict[str, Any]]()
    for text in args.at.split(","):
        rows, tokens = map(int, text.split("x"))
        setting = Setting(rows, tokens)
        lines.append(attempt(lambda setting=setting: measure(SHAPES[args.shape], setting, args)))
        if "failed" in lines[-1]:
            row(failed(setting.title, lines[-1], len(COLUMNS)))
        else:
            show(lines[-1])
        save(args.json, device, lines)


if __name__ == "__main__":
    main()
