"""What more machines would do, on paper: the share of a step that waits for the network, and tokens
per second and GPU beside one machine's.

    python benchmarks/traffic.py [--models qwen2.5-0.5b,…] [--gbit 400,100] [--gpus 8,64,512]

Nothing is measured: counts of `retool.model.traffic`, times by its timeline. Machines have 8 H200s,
0.4 of whose peak a step reaches while it waits for nothing, and 0.8 of NVLink's and the network's
bandwidth, which is a whole machine's; a message takes 3 µs within a machine and 15 µs between two.
16,384 tokens a GPU and micro-batch in documents of 4,096, nothing recomputed unless memory asks for
it, fp32 reduction. *one* is FSDP over all GPUs, *inside* HSDP (`fsdp_size=8`), *kept* means
`reshard_after_forward=false`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sft import BLANK, SHAPES
from table import head, row, save

from retool.model.config import Experts, ModelConfig
from retool.model.traffic.exchanges import Plan, step_exchanges
from retool.model.traffic.layouts import Layout, on, plans
from retool.model.traffic.machines import Machines, assumed
from retool.preflight.plan import choose
from retool.preflight.training_memory import Setting

PER_MACHINE = 8
GPU = "H200"
MEMORY = 139.0  # GiB
TOKENS = 16_384
DOCUMENT = 4_096
MODELS = {
    "qwen2.5-0.5b": SHAPES["qwen2.5-0.5b"],
    "llama3-8b": SHAPES["llama3-8b"],
    "qwen3-30b-a3b": ModelConfig(
        "qwen3_moe",
        vocab=151_936,
        hidden=2048,
        ffn=768,
        layers=48,
        heads=32,
        kv_heads=4,
        head_dim=128,
        tied=False,
        qkv_bias=False,
        **{**BLANK, "qk_norm": True},
        experts=Experts(128, 8, width=768, normalised=True),
    ),
}


def fitting(config: ModelConfig, plan: Plan) -> Plan | None:
    """The plan with the least recomputation that fits; None where nothing does."""
    setting = Setting(plan.shards, reshard=plan.reshard)
    chosen = choose(config, setting, DOCUMENT, TOKENS, None, MEMORY)
    return replace(plan, recompute=chosen.recompute, hold=chosen.hold) if chosen.fits else None


def layouts(config: ModelConfig, machines: Machines, gpus: int, micro_batches: int) -> list[Layout]:
    """Of each way to share parameters what fits and is fastest."""
    found: dict[int, Layout] = {}
    start = Plan(gpus, tokens=TOKENS, micro_batches=micro_batches, per_machine=PER_MACHINE)
    for plan in plans(start, PER_MACHINE):
        fit = fitting(config, plan)
        if fit is None:
            continue
        layout = on(config, fit, machines, DOCUMENT)
        best = found.setdefault(plan.shards, layout)
        if layout.expected.step < best.expected.step:
            found[plan.shards] = layout
    return [*found.values()]


def named(plan: Plan) -> str:
    words = "inside" if plan.replicas > 1 else "one"
    return words + ("" if plan.reshard else ", kept")


def speed(layout: Layout) -> float:
    """Tokens per second and GPU."""
    return layout.plan.tokens * layout.plan.micro_batches / layout.expected.step


def rows(args: argparse.Namespace, model: str) -> Iterator[dict[str, Any]]:
    """Of each number of GPUs its layouts, the same at every bandwidth; one machine's first."""
    config = MODELS[model]
    every = [assumed(PER_MACHINE, gbit, GPU) for gbit in args.gbit]
    alone = 0.0
    for gpus in sorted({PER_MACHINE, *args.gpus}):
        for layout in layouts(config, every[0], gpus, args.micro_batches):
            found = [on(config, layout.plan, machines, DOCUMENT) for machines in every]
            alone = alone or speed(found[0])
            yield {
                "model": model,
                "gpus": gpus,
                "layout": named(layout.plan),
                "sent": sum(one.sent for one in step_exchanges(config, layout.plan)) / 1e9,
                "waits": [one.expected.share for one in found],
                "tokens_per_second": speed(found[0]),
                "relative": [speed(one) / alone for one in found],
            }


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--gpus", type=numbers, default=[8, 64, 512])
    parser.add_argument("--gbit", type=numbers, default=[400, 100], help="of a machine's network")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    columns = ["", "GPUs", "layout", "GB sent a step"]
    columns += [f"waits at {gbit} Gbit/s" for gbit in args.gbit]
    columns += [f"tokens/s/GPU at {args.gbit[0]}"]
    columns += [f"of one machine's at {gbit}" for gbit in args.gbit]
    head(f"{args.micro_batches} micro-batch(es) of {TOKENS:,} tokens a GPU and step", columns)
    lines = list[dict[str, Any]]()
    for model in args.models.split(","):
        for line in rows(args, model):
            lines.append(line)
            cells = [line["model"], str(line["gpus"]), line["layout"], f"{line['sent']:.1f}"]
            cells += [f"{share:.0%}" for share in line["waits"]]
            cells += [f"{line['tokens_per_second']:,.0f}"]
            row([*cells, *(f"{share:.2f}" for share in line["relative"])])
            save(args.json, torch.device("cpu"), lines)


if __name__ == "__main__":
    main()
