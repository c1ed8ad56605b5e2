"""The gated MLP's elementwise half, act(gate) · up and its backward, inside compiled code: the compiler's
kernels against ours.

    python benchmarks/gated.py [--shapes 16384x4864x896,8192x14336x4096] [--json out.json]

A shape is tokens x ffn x width. What counts is the time of the elementwise kernels alone, without the
products around them, from a profile. GB/s counts what has to be moved: three numbers for each of tokens
x ffn in the forward, five in the backward (gate, up, the product's gradient; two gradients). *Share* is
that of a copy's GB/s. Ours writes a sixth number, the product, and keeps none: `kept` is what the forward
leaves for the backward, its result included. `error` is the gradient's ‖g − float64‖ / ‖float64‖ of gate
and up on the first 64 tokens. Without a GPU: torch's own operations, in wall time, neither compiled.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from kernels import device_events
from table import arguments, attempt, failed, hardware, head, measure, row, save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from retool.model.compile import compiled
from retool.model.gated import product
from retool.model.gated.product import gated_down
from retool.perf import GIB

OURS = product.fused_gated_down
ELEMENTWISE = ("triton_", "_gated_")
COLUMNS = [
    "tokens x ffn x width",
    "kernels",
    "forward ms",
    "GB/s",
    "share",
    "backward ms",
    "GB/s",
    "share",
    "kept GiB",
    "error",
]


def made(tokens: int, ffn: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up, down, and the gradient of the result."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = ((tokens, 2 * ffn), (width, ffn), (tokens, width))
    gate_up, down, flow = (
        torch.randn(*shape, device=device, generator=generator).to(dtype) for shape in shapes
    )
    return gate_up.requires_grad_(), down.requires_grad_(), flow


def exact(gate_up: Tensor, down: Tensor, flow: Tensor) -> Tensor:
    """The gradient of gate and up in float64, of the first 64 tokens."""
    leaf = gate_up[:64].detach().double().requires_grad_()
    out = gated_down(leaf, down.detach().double(), None, "silu")
    return torch.autograd.grad(out, leaf, flow[:64].double())[0]


def elementwise_ms(run: Any, device: torch.device, repeats: int) -> float:
    """Milliseconds that elementwise kernels take in a run; on the CPU those of the whole run."""
    run()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e3 * (time.perf_counter() - start) / repeats
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    spent = [
        end - start for name, start, end in device_events(found) if name.startswith(ELEMENTWISE)
    ]
    return sum(spent) / repeats


def kept_gib(make: Any, device: torch.device) -> float:
    """What a forward leaves behind."""
    if device.type != "cuda":
        return float("nan")
    before = torch.cuda.memory_allocated()
    out = make()
    found = torch.cuda.memory_allocated() - before
    del out
    return found / GIB


def line_of(shape: str, device: torch.device, repeats: int) -> dict[str, Any]:
    tokens, ffn, width = map(int, shape.split("x"))
    gate_up, down, flow = made(tokens, ffn, width, device)
    on_gpu = device.type == "cuda"
    piece = compiled(gated_down) if on_gpu else gated_down

    def forward() -> Tensor:
        return piece(gate_up, down, None, "silu")

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), [gate_up, down], flow)

    wanted = exact(gate_up, down, flow)
    error = ((both()[0][:64].double() - wanted).norm() / wanted.norm()).item()
    forward_ms = elementwise_ms(forward, device, repeats)
    both_ms = elementwise_ms(both, device, repeats)
    target = torch.empty_like(gate_up)
    copy_ms = statistics.median(measure(lambda: target.copy_(gate_up), device, repeats)["ms"])
    moved = tokens * ffn * gate_up.element_size()
    return {
        "forward_ms": forward_ms,
        "backward_ms": both_ms - forward_ms,
        "copy_gb_per_s": 4 * moved / copy_ms / 1e6,
        "forward_gb_per_s": 3 * moved / forward_ms / 1e6,
        "backward_gb_per_s": 5 * moved / max(both_ms - forward_ms, 1e-6) / 1e6,
        "kept_gib": kept_gib(forward, device),
        "error": error,
    }


def in_table(line: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return [line["shape"], *failed(line["kernels"], line, len(COLUMNS) - 1)]
    cells = [line["shape"], line["kernels"]]
    for way in ("forward", "backward"):
        rate = line[f"{way}_gb_per_s"]
        share = rate / line["copy_gb_per_s"]
        cells += [f"{line[f'{way}_ms']:.3f}", f"{rate:,.0f}", f"{share:.0%}"]
    return [*cells, f"{line['kept_gib']:.3f}", f"{line['error']:.1e}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", default="16384x4864x896,8192x14336x4096")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(hardware(device))
    head("act(gate) · up, silu", COLUMNS)
    lines = list[dict[str, Any]]()
    for shape in args.shapes.split(","):
        for name, operator in (("the compiler's", None), ("ours", OURS)):
            product.fused_gated_down = operator
            # The compiler has the other's code by the function's name
            torch.compiler.reset()
            found = attempt(partial(line_of, shape, device, args.repeats))
            lines.append({"shape": shape, "kernels": name, **found})
            row(in_table(lines[-1]))
            save(args.json, device, lines)
    product.fused_gated_down = OURS


if __name__ == "__main__":
    main()
