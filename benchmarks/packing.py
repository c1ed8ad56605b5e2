"""How evenly a step's samples are spread over data-parallel ranks and micro-batches, against
samples taken in order.

    python benchmarks/packing.py [--steps 50] [--json out.json]

*time ÷ ideal*: micro-batch j takes as long as its most expensive rank, so a step costs the sum over
j of the largest cost; ideal is the total cost divided by the ranks. Cost counts a sample's
attention (`retool.data.packing.cost`). *padding*: share of tokens that padding every micro-batch to
its longest sample would add; packs have none. Baseline: samples in order, as many per micro-batch
everywhere.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from table import hardware, head, row, save

from retool.data.packing import Budget, Plan, cost, plan_step

MAX_TOKENS = 16_384
CASES: dict[
    str, tuple[int, int, int, float, int]
] = {  # samples a step, ranks, median length, σ of its logarithm, longest
    "conversations of 500 tokens, 2 ranks": (64, 2, 500, 0.5, 4_096),
    "mixed, 2 ranks": (64, 2, 3_200, 0.7, 16_384),
    "mixed, 8 ranks": (256, 8, 3_200, 0.7, 16_384),
    "mixed, 3 ranks, 16 samples": (16, 3, 3_200, 0.7, 16_384),
}


def lengths(median: int, sigma: float, longest: int, count: int, seed: int) -> np.ndarray:
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(median), sigma, count))
    return np.clip(drawn, 32, longest).astype(int)


def in_order(n: np.ndarray, dp: int) -> Plan:
    """As many samples per micro-batch as fit the budget in the worst case; ranks take turns."""
    size = max(1, MAX_TOKENS // int(n.max()))
    groups = [list(range(i, min(i + size, len(n)))) for i in range(0, len(n), size)]
    groups += [[] for _ in range(-len(groups) % dp)]
    return [groups[rank::dp] for rank in range(dp)]


def over_ideal(plan: Plan, n: np.ndarray) -> float:
    costs = [[float(np.sum(cost(n[np.array(m, int)]))) for m in rank] for rank in plan]
    return sum(max(column) for column in zip(*costs, strict=True)) / (
        sum(map(sum, costs)) / len(plan)
    )


def padding(plan: Plan, n: np.ndarray) -> float:
    padded = sum(len(m) * int(n[m].max()) for rank in plan for m in rank if m)
    return padded / int(n.sum()) - 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(
        f"{hardware(torch.device('cpu'))}, numpy {np.__version__}; {args.steps} steps each, budget "
        f"{MAX_TOKENS:,} tokens a rank"
    )
    head("Spreading samples", ["", "", "time ÷ ideal", "worst", "padding saved", "plan ms"])
    lines = []
    for title, (samples, dp, median, sigma, longest) in CASES.items():
        found: dict[str, list[tuple[float, float, float]]] = {
            "in order (baseline)": [],
            "retool": [],
        }
        for step in range(args.steps):
            n = lengths(median, sigma, longest, samples, seed=step)
            start = time.perf_counter()
            ours = plan_step(n, Budget(MAX_TOKENS), dp)
            seconds = time.perf_counter() - start
            for name, plan in (("in order (baseline)", in_order(n, dp)), ("retool", ours)):
                found[name].append((over_ideal(plan, n), padding(plan, n), seconds))
        for name, values in found.items():
            ratios, pads, seconds = (list(v) for v in zip(*values, strict=True))
            lines.append(
                {
                    "case": title,
                    "row": name,
                    "over_ideal": statistics.median(ratios),
                    "worst": max(ratios),
                    "padding": statistics.median(pads),
                    "plan_ms": 1e3 * statistics.median(seconds),
                }
            )
            gains = (
                [f"{lines[-1]['padding']:.0%}", f"{lines[-1]['plan_ms']:.1f}"]
                if name == "retool"
                else ["", ""]
            )
            row([title, name, f"{statistics.median(ratios):.3f}", f"{max(ratios):.3f}", *gains])
            save(args.json, torch.device("cpu"), lines)


if __name__ == "__main__":
    main()
