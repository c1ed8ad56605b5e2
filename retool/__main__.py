"""`python -m retool`: what there is."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from retool import __version__

COMMANDS = (
    ("retool.sft", "key=value …", "multi-turn supervised fine-tuning; --check plans and stops"),
    ("retool.rl", "key=value …", "GRPO/DAPO with tools; --check plans and stops"),
    ("retool.data", "audit FILES --model M", "checks a data set and shows what of it is trained"),
    (
        "retool.checkpoint",
        "merge | verify | convert | ls DIR",
        "turns checkpoints into Hugging Face folders or other world sizes",
    ),
    (
        "retool.report",
        "RUN_DIR [RUN_DIR …]",
        "one HTML page about a run, or a comparison of several",
    ),
    (
        "retool.sandbox",
        "doctor | serve",
        "says what isolates generated programs here; runs them for others",
    ),
)


def main(words: list[str]) -> int:
    """List the commands that this version has. Exit status 2 where one was meant to be run."""
    meant = next(
        (module for module, _, _ in COMMANDS if words and module.endswith(f".{words[0].lower()}")),
        None,
    )
    if words and words[0] not in ("--help", "-h"):
        way_out = f"Write python -m {meant} …" if meant else "python -m retool lists the commands."
        print(f"python -m retool {words[0]}: no such command. {way_out}", file=sys.stderr)
        return 2
    print(
        f"retool {__version__}: post-training of tool-using language models on the GPUs you have.\n"
    )
    for module, arguments, what in COMMANDS:
        if find_spec(module) is not None and find_spec(f"{module}.__main__") is not None:
            print(f"  python -m {module} {arguments}\n      {what}")
    print("\nEach of them has --help.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
