"""`retool generate MODEL FILE`: answers to a file of prompts, as JSON lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from retool.config.command import calm_threads, in_own_words
from retool.talk.options import (
    NO_TOOLS,
    OWN_WORDS,
    add_environment,
    add_max_num_seqs,
    add_options,
    require_effect,
)

EPILOG = """A line of the output has the row, and `completions`: of each its last text, why it ended
(finish_reason: stop, length, max_turns, tool_failure), its tokens, and all messages with tool calls and
results. The output appears when it is whole; stopped before, the same command goes on from
OUT.partial, and gives what it would have given at once.

examples:
  retool generate MODEL questions.jsonl --out answers.jsonl --temperature 0
  retool generate runs/dapo test.parquet --out samples.jsonl --n 8 --tools code
  retool generate runs/dapo rows.jsonl --out played.jsonl --environment games.py/Guess"""


def parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        program,
        description="Write a model's answers to the prompts of a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(top, tools=NO_TOOLS, max_tokens=2048)
    top.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="files, folders, globs or data sets of the hub, as data.train_files takes them",
    )
    top.add_argument("--out", type=Path, required=True, metavar="OUT", help="the file to write")
    top.add_argument(
        "--column",
        help="where the prompt is: a text, or messages (default: prompt, messages, question …)",
    )
    top.add_argument("--n", type=int, default=1, help="answers to each (default: %(default)s)")
    top.add_argument(
        "--max-rows", type=int, default=-1, help="only the first rows (default: %(default)s: all)"
    )
    add_max_num_seqs(top)
    add_environment(top)
    return top


def main(words: Sequence[str], program: str = "python -m retool generate") -> int:
    """Exit status: 0 done, 1 something is wrong and was said."""
    options = parser(program).parse_args(words)
    calm_threads()
    # Heavy imports come late: `--help` doesn't wait for torch.
    from retool.talk.writing import write_answers

    try:
        require_effect(options)
        return write_answers(options)
    except (ValueError, OSError) as error:
        print(f"error: {in_own_words(error, OWN_WORDS)}", file=sys.stderr)
        return 1
