"""`python -m retool.checkpoint merge | verify | convert | ls`."""

from __future__ import annotations

import argparse
import sys
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from retool.checkpoint import folder as on_disk
from retool.checkpoint.merge import convert, merge
from retool.checkpoint.shards import ShardSource
from retool.checkpoint.verify import assurance, verify
from retool.checkpoint.whole import latest
from retool.files.untrusted import shown
from retool.metrics import printable

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """The command line.

    Exit status: 0 done, 1 something is wrong with the checkpoint or the disk, 2 wrong usage.
    """
    top = argparse.ArgumentParser(
        "python -m retool.checkpoint",
        description="Work with sharded checkpoints, retool's or verl's.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "merge", help="write the weights as a Hugging Face folder", description=merge.__doc__
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint: …/global_step_N")
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    command.add_argument("--dtype", choices=DTYPES, default="bf16")
    command = commands.add_parser(
        "verify",
        help="check files, shapes, checksums, finiteness and the export",
        description=verify.__doc__,
    )
    command.add_argument("folder", type=Path, metavar="DIR")
    command = commands.add_parser(
        "convert",
        help="rewrite the shards for another number of ranks",
        description=convert.__doc__,
    )
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--world-size", type=int, required=True, metavar="M")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="default: replace DIR once the new one is complete"
    )
    command = commands.add_parser(
        "ls", help="list the checkpoints of a run", description=list_checkpoints.__doc__
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


def list_checkpoints(root: Path, console: Console) -> int:
    """Steps, sizes, world sizes and contents under a run's folder; * marks the one that a resume
    takes.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    chosen = latest(root)
    table = Table("", "step", "ranks", "GiB", "holds", "state")
    for step, path in on_disk.steps(root):
        row = ("*" if path == chosen else "", str(step), *_described(path))
        # As text: names of unknown origin would else be read as markup
        table.add_row(*map(Text, row))
    console.print(
        table if table.row_count else Text(f"{shown(str(root))} holds no checkpoint."),
        soft_wrap=True,
    )
    return 0


def _described(path: Path) -> tuple[str, str, str, str]:
    """Ranks, size, contents and state of a checkpoint as `ls` shows them."""
    try:
        where = on_disk.model_folder(path)
        wrong = on_disk.faults(where)
        kinds = [
            kind
            for kind in ("model", "optim", "extra_state")
            if any(where.glob(f"{kind}_world_size_*.pt"))
        ]
        kinds += ["export"] if any((where / "huggingface").glob("*.safetensors")) else []
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        ranks = "?" if wrong else str(on_disk.world_size(where))
        condition = (
            shown(wrong[0])
            if wrong
            else "complete"
            if on_disk.recorded(where)
            else "complete, without checksums"
        )
    except OSError as error:
        return "?", "?", "", f"can't be read ({error.strerror or error})"
    return ranks, f"{size / 2**30:.2f}", " ".join(kinds), condition


def run(options: argparse.Namespace, console: Console) -> int:
    """Run a parsed command; its exit status."""
    if options.command == "ls":
        return list_checkpoints(options.root, console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("M elements"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(options.command, total=work(options))
        done = 0

        def progress(what: str, elements: int) -> None:
            nonlocal done
            done += elements
            bar.update(
                task, completed=done // 10**6, description=escape(f"{options.command} {what}")
            )

        if options.command == "merge":
            files = merge(options.folder, options.out, DTYPES[options.dtype], progress)
            message = (
                f"{options.out}: {len(files)} file(s), "
                f"{sum(f.stat().st_size for f in files) / 2**30:.2f} GiB"
            )
            status = 0
        elif options.command == "convert":
            message = (
                f"{convert(options.folder, options.world_size, options.out, progress)}: "
                f"{options.world_size} rank(s)"
            )
            status = 0
        else:
            problems = verify(options.folder, progress)
            message = "\n".join(problems) or assurance(options.folder)
            status = int(bool(problems))
    for line in message.splitlines():
        console.print(printable(line), soft_wrap=True, markup=False, highlight=False)
    return status


def work(options: argparse.Namespace) -> int | None:
    """Millions of elements that a command will go through; None where the folder doesn't say."""
    where = on_disk.model_folder(options.folder)
    if on_disk.faults(where) or not any(where.glob("model_world_size_*_rank_0.pt")):
        return None
    source = ShardSource(where)
    elements = sum(prod(source.shape(name)) for name in source.names())
    passes = (
        1
        if options.command == "merge"
        else 3
        if any(where.glob("optim_world_size_*_rank_0.pt"))
        else 1
    )
    exported = options.command == "verify" and any((where / "huggingface").glob("*.safetensors"))
    return elements * (passes + exported) // 10**6


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 and one line on standard error for what the user can do something about."""
    options = parser().parse_args(arguments)
    try:
        return run(options, Console() if sys.stdout.isatty() else Console(width=200))
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
