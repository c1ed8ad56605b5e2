"""The gated MLP's elementwise half, act(gate) · up and its backward, inside compiled code: the compiler's
kernels against ours.

    python benchmarks/gated.py [--shapes 16384x4864x896,8192x14336x4096] [--json out.json]

A shape is tokens x ffn x width. What counts is the time of the elementwise kernels alone, without the
products around them, from a profile. GB/s counts what has to be moved: three numbers for each of tokens
x ffn in the forward, five in the backward (gate, up, the product's gradient; two gradients). *Share* is
that of a copy's GB/s. Ours writes a sixth number, the product, and keeps none: `kept` is what the forward
leaves for the backward, its result included. `error` is the input's gradient's ‖g − float64‖ / ‖float64‖
on the first 64 tokens. Without a GPU: torch's own operations, in wall time, neither compiled.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from kernels import device_events
from table import arguments, attempt, failed, hardware, head, measure, row, save
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from retool.model.block import swiglu
from retool.model.compiling.pieces import compiled
from retool.model.fused import gated
from retool.perf import GIB

OURS = gated.fused_gated_down
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


class Mlp(nn.Module):
    """A block's, whose sizes the compiler knows."""

    def __init__(self, ffn: int, width: int, device: torch.device) -> None:
        super().__init__()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def matrix(rows: int, columns: int) -> nn.Parameter:
            values = torch.randn(rows, columns, device=device, generator=generator)
            return nn.Parameter((values * columns**-0.5).to(dtype))

        self.gate_up = matrix(2 * ffn, width)
        self.down = matrix(width, ffn)

    def forward(self, x_tD: Tensor) -> Tensor:
        return swiglu(x_tD, self.gate_up, self.down)


def exact(mlp: Mlp, x_tD: Tensor, flow_tD: Tensor) -> Tensor:
    """The gradient of x in float64, of the first 64 tokens."""
    leaf = x_tD[:64].detach().double().requires_grad_()
    out = swiglu(leaf, mlp.gate_up.detach().double(), mlp.down.detach().double())
    return torch.autograd.grad(out, leaf, flow_tD[:64].double())[0]


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
    torch.manual_seed(0)
    mlp = Mlp(ffn, width, device)
    dtype = mlp.down.dtype
    x, flow = torch.randn(2, tokens, width, device=device).to(dtype)
    x.requires_grad_()
    piece = compiled(Mlp.forward) if device.type == "cuda" else Mlp.forward

    def forward() -> Tensor:
        return piece(mlp, x)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), [x, *mlp.parameters()], flow)

    wanted = exact(mlp, x, flow)
    error = ((both()[0][:64].double() - wanted).norm() / wanted.norm()).item()
    forward_ms = elementwise_ms(forward, device, repeats)
    both_ms = elementwise_ms(both, device, repeats)
    source = torch.zeros(tokens, 2 * ffn, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = statistics.median(measure(lambda: target.copy_(source), device, repeats)["ms"])
    moved = tokens * ffn * dtype.itemsize
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
            gated.fused_gated_down = operator
            if device.type == "cuda":
                torch.compiler.reset()  # it has the other's code by the function's name
            found = attempt(partial(line_of, shape, device, args.repeats))
            lines.append({"shape": shape, "kernels": name, **found})
            row(in_table(lines[-1]))
            save(args.json, device, lines)
    gated.fused_gated_down = OURS


if __name__ == "__main__":
    main()
