"""`python -m retool`: what there is."""

from __future__ import annotations

from importlib.util import find_spec

from retool import __version__

COMMANDS = (
    ("retool.sft", "key=value …", "multi-turn supervised fine-tuning; --check plans and stops"),
    ("retool.rl", "key=value …", "GRPO/DAPO with tools; --check plans and stops"),
    ("retool.data", "audit FILES --model M", "checks a data set and shows what of it is trained"),
    ("retool.checkpoint", "merge | verify | convert | ls DIR", "turns checkpoints into Hugging Face folders or other world sizes"),
    ("retool.report", "RUN_DIR [RUN_DIR …]", "one HTML page about a run, or a comparison of several"),
    ("retool.rl.sandbox", "doctor | serve", "says what isolates generated programs here; runs them for others"),
)


def main() -> None:
    """List the commands that this version has."""
    print(f"retool {__version__}: post-training of tool-using language models on the GPUs you have.\n")
    for module, arguments, what in COMMANDS:
        if find_spec(module) is not None and find_spec(f"{module}.__main__") is not None:
            print(f"  python -m {module} {arguments}\n      {what}")
    print("\nEach of them has --help.")


if __name__ == "__main__":
    main()
