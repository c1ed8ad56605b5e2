"""`retool COMMAND …`, and `python -m retool COMMAND …`: every command by its name."""

from __future__ import annotations

import difflib
import importlib
import shutil
import sys
import textwrap
from dataclasses import dataclass

from retool import __version__


@dataclass(frozen=True)
class Command:
    """A command: the module whose `main(words, program)` runs it, and what the list says of it."""

    module: str
    arguments: str
    purpose: str


COMMANDS = {
    "sft": Command(
        "retool.sft.__main__",
        "key=value …",
        "multi-turn supervised fine-tuning; --check plans and stops",
    ),
    "rl": Command(
        "retool.rl.__main__",
        "key=value …",
        "GRPO/DAPO with tools; --check plans and stops",
    ),
    "data": Command(
        "retool.data.__main__",
        "audit FILES --model M",
        "checks a data set and shows which of its tokens are trained",
    ),
    "checkpoint": Command(
        "retool.checkpoint.__main__",
        "merge | verify | convert | ls DIR",
        "converts checkpoints: to Hugging Face folders, or for other numbers of GPUs",
    ),
    "report": Command(
        "retool.report.__main__",
        "RUN_DIR [RUN_DIR …]",
        "one HTML page about a run, or a comparison of several",
    ),
    "models": Command(
        "retool.preflight.models",
        "[FOLDER]",
        "lists models and what works with each, or says how a folder's model runs",
    ),
    "sandbox": Command(
        "retool.sandbox.__main__",
        "doctor | serve",
        "says how this machine isolates generated programs; serves the sandbox to others",
    ),
    "doctor": Command(
        "retool.doctor.__main__",
        "[--folder DIR]",
        "checks the machines and the network between them before a run",
    ),
    "chat": Command(
        "retool.talk.chat",
        "MODEL",
        "talks to a model in the terminal, with its tools",
    ),
    "generate": Command(
        "retool.talk.generate",
        "MODEL FILE",
        "writes answers to a file of prompts",
    ),
    "serve": Command(
        "retool.serve.__main__",
        "MODEL",
        "serves a model over HTTP, with OpenAI's API",
    ),
}
# These run in several processes, where torchrun's options are among their words
DISTRIBUTED = ("sft", "rl", "doctor")
HELP = ("help", "--help", "-h")
VERSION = ("version", "--version", "-V")
# What people call a command of ours elsewhere
OTHER_NAMES = {
    "train": "sft",
    "finetune": "sft",
    "fine-tune": "sft",
    "ppo": "rl",
    "grpo": "rl",
    "dapo": "rl",
    "audit": "data",
    "merge": "checkpoint",
    "verify": "checkpoint",
    "convert": "checkpoint",
    "export": "checkpoint",
}


def main(words: list[str]) -> int:
    """Run the command that the first word names. Exit status 2 where there is no such command."""
    if not words or words[0] in HELP:
        return _help(words[1:])
    if words[0] in VERSION:
        print(f"retool {__version__}")
        return 0
    name = words[0].removeprefix("retool.")
    if name not in COMMANDS:
        print(f"retool {words[0]}: no such command. {_way_out(words[0])}", file=sys.stderr)
        return 2
    rest = words[1:]
    if name in DISTRIBUTED and not {"--help", "-h"} & set(rest):
        from retool.parallel.launch import launch, split

        options, others = split(rest)
        if options:
            return launch(f"retool.{name}", options, others)
    module = importlib.import_module(COMMANDS[name].module)
    return module.main(rest, f"retool {name}")


def _help(words: list[str]) -> int:
    """The list of commands; `retool help sft` is `retool sft --help`."""
    if words and words[0] in COMMANDS:
        return main([words[0], "--help"])
    width = min(shutil.get_terminal_size().columns, 100)
    print("usage: retool COMMAND …   (the same: python -m retool COMMAND …)\n")
    about = "trains language models to use tools, on the GPUs you have."
    print("\n".join(textwrap.wrap(f"retool {__version__}: {about}", width)) + "\n")
    for name, command in COMMANDS.items():
        print(f"  retool {name} {command.arguments}")
        indent = " " * 6
        print(
            textwrap.fill(command.purpose, width, initial_indent=indent, subsequent_indent=indent)
        )
    print("\nEach of them has --help. On two GPUs: retool sft --nproc_per_node=2 key=value …")
    return 0


def _way_out(word: str) -> str:
    if "=" in word:
        return "A command comes first: retool sft key=value …, or retool rl key=value …"
    lower = word.lower()
    if lower in OTHER_NAMES:
        return f"Did you mean retool {OTHER_NAMES[lower]}?"
    near = difflib.get_close_matches(lower, COMMANDS, n=1, cutoff=0.5)
    if near:
        return f"Did you mean retool {near[0]}?"
    return f"There is {', '.join(COMMANDS)}; retool --help says what each does."


def run() -> None:
    """The console script."""
    # A list of names waits for no library
    from retool.config.command import exit_status

    sys.exit(exit_status(lambda: main(sys.argv[1:])))


if __name__ == "__main__":
    run()
