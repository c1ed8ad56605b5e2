"""`python -m retool.checkpoint merge | verify | convert | ls`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from retool.checkpoint.convert import convert
from retool.checkpoint.format.folder import faulty_files, holds_export, holds_shards, model_folder
from retool.checkpoint.listing import list_checkpoints
from retool.checkpoint.merge import Progress, merge
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.verify import assurance, verify
from retool.config.command import exit_status
from retool.metrics import printable

PROGRAM = "python -m retool.checkpoint"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line.

    Exit status: 0 done, 1 something is wrong with the checkpoint or the disk, 2 wrong usage.
    """
    top = argparse.ArgumentParser(
        program,
        description="Work with sharded checkpoints, retool's or verl's.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "merge",
        help="write the weights as a Hugging Face folder",
        description="Write a checkpoint's weights as a folder that transformers loads: safetensors "
        "files, the configuration and the tokenizer.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint: …/global_step_N")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the weights (default: %(default)s)"
    )
    command = commands.add_parser(
        "verify",
        help="check files, shapes, checksums, finiteness and the export",
        description="Check that every file of a checkpoint is there and whole: sizes, checksums, "
        "shapes, and that every value is finite. A Hugging Face folder in it is checked, too.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint: …/global_step_N")
    command = commands.add_parser(
        "convert",
        help="rewrite the shards for another number of ranks",
        description="Rewrite a checkpoint so that M ranks resume it, each reading a file of its own. "
        "(Any number of ranks resumes any checkpoint; other programs may want this.)",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint: …/global_step_N")
    command.add_argument(
        "--world-size", type=int, required=True, metavar="M", help="ranks to write it for"
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="default: replace DIR once the new one is complete"
    )
    command = commands.add_parser(
        "ls",
        help="list the checkpoints of a run",
        description="Show the steps, sizes, world sizes and contents of a run's checkpoints; * marks "
        "the one that a resume takes.",
    )
    command.add_argument(
        "root",
        type=Path,
        nargs="?",
        default=Path(),
        metavar="ROOT",
        help="the run's folder (default: here)",
    )
    return top


def run(options: argparse.Namespace, console: Console) -> int:
    """Run a parsed command; its exit status."""
    if options.command == "ls":
        return list_checkpoints(options.root, console)
    with _bar(options) as progress:
        status, message = COMMANDS[options.command](options, progress)
    for line in message.splitlines():
        console.print(printable(line), soft_wrap=True, markup=False, highlight=False)
    return status


def _merge(options: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    files = merge(options.folder, options.out, DTYPES[options.dtype], progress)
    size = sum(file.stat().st_size for file in files)
    return 0, f"{options.out}: {len(files)} file(s), {size / 2**30:.2f} GiB"


def _convert(options: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    written = convert(options.folder, options.world_size, options.out, progress)
    return 0, f"{written}: {options.world_size} rank(s)"


def _verify(options: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    if problems := verify(options.folder, progress):
        return 1, "\n".join(problems)
    return 0, assurance(options.folder)


# What a command returns: its exit status, and what it says.
COMMANDS = {"merge": _merge, "convert": _convert, "verify": _verify}


@contextmanager
def _bar(options: argparse.Namespace) -> Iterator[Progress]:
    """A progress bar on standard error, and the function that moves it on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("M elements"),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(options.command, total=work(options))
        done = 0

        def progress(what: str, elements: int) -> None:
            nonlocal done
            done += elements
            description = escape(f"{options.command} {what}")
            bar.update(task, completed=done // 10**6, description=description)

        yield progress


def work(options: argparse.Namespace) -> int | None:
    """Millions of elements that a command will go through; None if the folder doesn't say."""
    where = model_folder(options.folder)
    if faulty_files(where) or not holds_shards(where, "model"):
        return None
    source = ShardSource(where)
    elements = sum(prod(source.shape(name)) for name in source.names())
    passes = 1
    if options.command != "merge" and holds_shards(where, "optim"):
        passes += 2  # AdamW's moments
    if options.command == "verify" and holds_export(where):
        passes += 1
    return elements * passes // 10**6


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """The command line. Returns 1, with one line on standard error, for errors that the user can
    mend.
    """
    options = parser(program).parse_args(arguments)
    try:
        # In a file or a pipe there is no width, and rich would break lines at 80
        return run(options, Console() if sys.stdout.isatty() else Console(width=200))
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
