"""`python -m tests.reliability [--runs N] [--seed S]`: the fault table.

Fault → what happens → seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.reliability.campaign import Outcome, draw, play, prepare
from tests.reliability.faults import FAULTS


def make_work(folder: Path) -> Path:
    """The tiny model and data of the tests."""
    from tests.sft.conftest import make

    return make(folder)


def table(outcomes: list[Outcome]) -> str:
    """A row for each fault, in Markdown."""
    rows = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.fault].append(outcome)
    lines = [
        "| fault | runs | first run ends with | the same command again | seconds |",
        "|---|---:|---|---|---:|",
    ]
    for fault in FAULTS:
        if found := rows.get(fault.name):
            ends = Counter(min(o.statuses) or max(o.statuses) for o in found)
            first = ", ".join(str(status) for status, _ in ends.most_common()) + (
                f": {fault.told}" if fault.told else ""
            )
            then = (
                "goes on, same weights bit for bit"
                if fault.second == 0
                else f"refused: {fault.told_then}"
            )
            broken = sum(bool(o.broken) for o in found)
            lines.append(
                f"| {fault.name} | {len(found)} | {first} | "
                f"{then}{f' (**{broken} broken**)' if broken else ''} | "
                f"{statistics.median(o.seconds for o in found):.1f} |"
            )
    return "\n".join(lines)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.reliability", description=__doc__)
    parser.add_argument(
        "--runs",
        type=int,
        default=len(FAULTS),
        help="how many, each with one fault (default: each fault once)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="faults with this in their name")
    options = parser.parse_args(words)
    begin = time.monotonic()
    outcomes = list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="retool-faults-") as root:
        stage = prepare(make_work(Path(root) / "work"), Path(root))
        chosen = [fault for fault in draw(options.runs, options.seed) if options.only in fault.name]
        for number, fault in enumerate(chosen):
            outcomes.append(play(stage, number, fault, options.seed * 1_000_003 + number))
            if outcomes[-1].broken:
                print(f"{number}: {fault.name}: {outcomes[-1].broken}\n", flush=True)
    print(table(outcomes))
    broken = sum(bool(outcome.broken) for outcome in outcomes)
    print(f"\n{len(outcomes)} runs, {broken} broke the rule, {time.monotonic() - begin:.0f} s")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
