"""`python -m tests.reliability [--command sft|rl] [--runs N] [--seed S]`: the fault table.

Fault → what happens → seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.reliability.campaign import FAULTS_OF, Outcome, draw, play, prepare
from tests.reliability.commands import RL, SFT, Command
from tests.reliability.faults import Fault

COMMANDS = {"sft": SFT, "rl": RL}


def table(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> str:
    """A row for each fault that was played, in Markdown."""
    rows = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.fault].append(outcome)
    lines = [
        "| fault | runs | first run ends with | the same command again | seconds |",
        "|---|---:|---|---|---:|",
    ]
    for fault in faults:
        if found := rows.get(fault.name):
            ends = Counter(_ends(outcome) for outcome in found)
            first = ", ".join(status for status, _ in ends.most_common()) + (
                f": {fault.told}" if fault.told else ""
            )
            then = f"refused: {fault.told_then}" if fault.second else "goes on"
            if fault.exact and not fault.second:
                then += ", same weights bit for bit"
            broken = sum(bool(o.broken) for o in found)
            lines.append(
                f"| {fault.name} | {len(found)} | {first} | "
                f"{then}{f' (**{broken} broken**)' if broken else ''} | "
                f"{statistics.median(o.seconds for o in found):.1f} |"
            )
    return "\n".join(lines)


def _ends(outcome: Outcome) -> str:
    """The exit statuses of a run's processes, 0 alone where all are."""
    return " and ".join(str(status) for status in sorted({*outcome.statuses} - {0})) or "0"


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.reliability", description=__doc__)
    parser.add_argument("--command", choices=list(COMMANDS), default="", help="default: both")
    parser.add_argument(
        "--runs",
        type=int,
        default=0,
        help="of each command, each with one fault (default: each fault once)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="faults with this in their name")
    options = parser.parse_args(words)
    chosen = [COMMANDS[options.command]] if options.command else list(COMMANDS.values())
    broken = 0
    with tempfile.TemporaryDirectory(prefix="retool-faults-") as root:
        for command in chosen:
            broken += play_all(command, Path(root) / command.name, options)
    return int(broken > 0)


def play_all(command: Command, root: Path, options: argparse.Namespace) -> int:
    """Play a command's faults and print its table; how many broke the rule."""
    begin = time.monotonic()
    outcomes = list[Outcome]()
    stage = prepare(command, root)
    runs = options.runs or len(FAULTS_OF[command.name])
    drawn = draw(command, runs, options.seed)
    for number, fault in enumerate(fault for fault in drawn if options.only in fault.name):
        outcome = play(stage, number, fault, options.seed * 1_000_003 + number)
        outcomes.append(outcome)
        said = f"broken: {outcome.broken}\n" if outcome.broken else f"{outcome.seconds:.1f} s"
        print(f"{command.name} {number}: {fault.name}: {said}", file=sys.stderr, flush=True)
    print(f"\n`python -m retool.{command.name}`\n\n{table(FAULTS_OF[command.name], outcomes)}")
    broken = sum(bool(outcome.broken) for outcome in outcomes)
    print(f"\n{len(outcomes)} runs, {broken} broke the rule, {time.monotonic() - begin:.0f} s")
    return broken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
