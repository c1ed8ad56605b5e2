"""Attention kernels, forward and forward + backward, on the packs that training sees.

    python benchmarks/attention.py [--heads 14/2x64,7/1x64,32/8x128] [--packs full,mixed,…] [--json out.json]

*full*: one document of 16,384 tokens. *8×4k*, *16×2k*, *32×1k*: 32,768 tokens in equal documents.
*mixed*: 32,768 tokens in documents of lognormal length (median 3,200, σ 0.7, clipped to
256…16,384). *sorted*: the same, longest first, so that cudnn meets the short ones in one run.
TFLOP/s counts causal attention: 2·n²·N·H forward, 5·n²·N·H backward (the recomputed scores
included, as is customary). `error` is the output's ‖out − float32‖ / ‖float32‖; `speed` is against
the first row. Without a GPU: the reference alone, on lengths divided by 32.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from table import arguments, attempt, failed, hardware, head, measure, row, save, spread

from retool.model.attention import cudnn as attention_cudnn
from retool.model.attention.dispatch import attention, attention_forward_lse, choose_backend
from retool.model.attention.flash import available
from retool.model.attention.pack import new_pack

BASELINE = "varlen"


def packs(scale: int) -> dict[str, tuple[int, ...]]:
    lengths = np.clip(
        np.exp(np.random.default_rng(0).normal(np.log(3_200), 0.7, 64)), 256, 16_384
    ).astype(int)
    mixed = lengths[: int(np.searchsorted(lengths.cumsum(), 32_768))]
    all_packs = {"full": [16_384], "8×4k": [4096] * 8, "16×2k": [2048] * 16, "32×1k": [1024] * 32}
    all_packs |= {"mixed": mixed.tolist(), "sorted": sorted(mixed.tolist(), reverse=True)}
    return {name: tuple(max(1, n // scale) for n in seqlens) for name, seqlens in all_packs.items()}


def lines_for(
    heads: int, kv_heads: int, head_dim: int, name: str, seqlens: tuple[int, ...], args: Namespace
) -> Iterator[dict[str, Any]]:
    """One line per backend that can run here; `cudnn` with its threshold and with every document
    long enough.
    """
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (sum(seqlens), heads + 2 * kv_heads, head_dim)
    q, k, v = torch.randn(shape, device=device, dtype=dtype, generator=generator).split(
        [heads, kv_heads, kv_heads], 1
    )
    # Strided views of one buffer, as in a model
    q, k, v = (x.requires_grad_() for x in (q.detach(), k.detach(), v.detach()))
    d_out = torch.randn(
        sum(seqlens), heads, head_dim, device=device, dtype=dtype, generator=generator
    )
    pack = new_pack(seqlens, device)
    exact, _ = attention_forward_lse(q.float(), k.float(), v.float(), pack, "reference")
    pairs = sum(n * n for n in seqlens) * heads * head_dim

    def timed(wanted: str) -> dict[str, Any]:
        backend = choose_backend(device, dtype, head_dim, wanted)

        def forward() -> torch.Tensor:
            return attention_forward_lse(q, k, v, pack, backend)[0]

        def both() -> None:
            torch.autograd.grad(attention(q, k, v, pack, backend), [q, k, v], d_out)

        error = ((forward().float() - exact).norm() / exact.norm()).item()
        found = {
            "forward": measure(forward, device, args.repeats),
            "both": measure(both, device, args.repeats),
        }
        tflops = {
            key: flops * pairs / statistics.median(found[key]["ms"]) / 1e9
            for key, flops in (("forward", 2), ("both", 7))
        }
        return {"error": error, **found, "tflops": tflops}

    for wanted, shortest in backends(device):
        attention_cudnn.CUDNN_SHORTEST = shortest
        attention_cudnn._runs.cache_clear()
        title = f"{wanted}, documents ≥ {shortest}" if wanted == "cudnn" else wanted
        yield {
            "heads": f"{heads}/{kv_heads}x{head_dim}",
            "pack": name,
            "backend": title,
            **attempt(partial(timed, wanted)),
        }


def backends(device: torch.device) -> list[tuple[str, int]]:
    """(name, shortest document that cuDNN takes)."""
    if device.type != "cuda":
        return [("reference", 0)]
    flash = [(name, 0) for name in available(device) if name != BASELINE]
    return [(BASELINE, 0), *flash, ("cudnn", attention_cudnn.CUDNN_SHORTEST), ("cudnn", 1)]


COLUMNS = [
    "pack",
    "kernel",
    "forward ms",
    "TFLOP/s",
    "forward + backward ms",
    "TFLOP/s",
    "speed",
    "error",
]


def in_table(line: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return [line["pack"], *failed(line["backend"], line, len(COLUMNS) - 1)]
    ratio = (
        ""
        if "failed" in base
        else f"{statistics.median(base['both']['ms']) / statistics.median(line['both']['ms']):.2f}×"
    )
    cells = [
        part
        for way in ("forward", "both")
        for part in (spread(line[way]["ms"]), f"{line['tflops'][way]:.3g}")
    ]
    return [line["pack"], line["backend"], *cells, ratio, f"{line['error']:.1e}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--heads",
        default="14/2x64,7/1x64,32/8x128",
        help="query/key-value heads x head dim, comma-separated",
    )
    parser.add_argument("--packs", default="full,8×4k,16×2k,32×1k,mixed,sorted")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(hardware(device))
    every = list[dict[str, Any]]()
    chosen = packs(1 if device.type == "cuda" else 32)
    threshold = attention_cudnn.CUDNN_SHORTEST
    for heads in args.heads.split(","):
        counts, head_dim = heads.split("x")
        query_heads, kv_heads = map(int, counts.split("/"))
        head(f"heads {counts}, head dim {head_dim}", COLUMNS)
        for pack in args.packs.split(","):
            base = None
            for line in lines_for(query_heads, kv_heads, int(head_dim), pack, chosen[pack], args):
                base = base or line
                row(in_table(line, base))
                every.append(line)
                save(args.json, device, every)
            attention_cudnn.CUDNN_SHORTEST = threshold


if __name__ == "__main__":
    main()
