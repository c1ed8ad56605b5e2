"""`retool doctor`: one table of what a run will find here; under torchrun, on all machines together."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from retool.config.command import calm_threads, exit_status

PROGRAM = "python -m retool.doctor"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog=program,
        description="What is wrong with the machines and the network between them, before a run. Exit "
        "status 1 where something is. On two GPUs: retool doctor --nproc_per_node=2; on several "
        "machines start it as you start a run (torchrun … -m retool.doctor).",
    )
    top.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        help="where the run will write (trainer.default_local_dir); default: the current one",
    )
    top.add_argument(
        "--command",
        choices=("sft", "rl"),
        default="rl",
        help="sft needs no sandbox (default: %(default)s)",
    )
    top.add_argument(
        "--megabytes",
        type=int,
        default=64,
        help="that each rank exchanges to measure the network (default: %(default)s)",
    )
    top.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="also say what a step of this model would wait for the network here",
    )
    top.add_argument(
        "--tokens",
        type=int,
        default=16_384,
        help="of that step, on each rank (default: %(default)s)",
    )
    top.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    return top


def main(words: list[str], program: str = PROGRAM) -> int:
    """Print the table, on rank 0. Exit status: 0 nothing is wrong, 1 something is."""
    options = parser(program).parse_args(words)
    calm_threads()
    from retool.doctor.examine import Wanted, examine
    from retool.doctor.finding import table

    wanted = Wanted(
        options.folder,
        options.command == "rl",
        options.megabytes,
        options.device,
        options.model,
        options.tokens,
    )
    found = examine(wanted)
    if os.environ.get("RANK", "0") == "0":
        print(table(found), flush=True)
    return int(any(finding.problem for finding in found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
