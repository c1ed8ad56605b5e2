"""`python -m retool.data audit FILES --model M`: check a dataset without a GPU.

Exit status 0 when every row can be used, 1 when any is refused, 2 when the audit can't run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from retool.data.audit.audit import RowProgress, audit, clean, count_rows, show_audit
from retool.data.audit.page import write_page
from retool.data.read.files import load_function, resolve_files
from retool.data.render.dates import fix_date, today
from retool.data.render.renderer import HISTORIES, Renderer, load_tokenizer, other_tokens
from retool.data.tokenise import TRUNCATIONS
from retool.model.hub import find_model

EXAMPLE = (
    "example: python -m retool.data audit train.parquet --model Qwen/Qwen2.5-0.5B-Instruct "
    "--max-length 16384 --html audit.html"
)


def parser() -> argparse.ArgumentParser:
    """The command line; each option's key in a training run is in its help."""
    top = argparse.ArgumentParser(
        prog="python -m retool.data", description="Datasets of conversations."
    )
    commands = top.add_subparsers(dest="command", required=True)
    own = commands.add_parser(
        "audit",
        help="check and show a dataset",
        description="Check every row as training would.",
        epilog=EXAMPLE,
    )
    own.add_argument(
        "files",
        nargs="+",
        help="parquet or JSON-lines files, folders, globs, URLs (data.train_files)",
    )
    own.add_argument(
        "--model",
        required=True,
        help="folder or hub id with the tokenizer (model.partial_pretrain)",
    )
    own.add_argument(
        "--max-length",
        type=int,
        default=4096,
        help="longest sample in tokens (data.max_length; default %(default)s)",
    )
    own.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        default="error",
        help="what becomes of longer ones (data.truncation)",
    )
    own.add_argument(
        "--history",
        choices=HISTORIES,
        default="error",
        help="templates that rewrite history (data.multiturn.history)",
    )
    own.add_argument("--chat-template", help="hermes, or a jinja file (data.chat_template)")
    own.add_argument(
        "--template-kwargs",
        type=_mapping,
        default={},
        metavar="JSON",
        help="data.apply_chat_template_kwargs",
    )
    own.add_argument(
        "--reasoning-in-content",
        action="store_true",
        help="write thoughts as <think>…</think> (data.reasoning_in_content)",
    )
    own.add_argument(
        "--drop-reasoning", action="store_true", help="leave thoughts out (data.drop_reasoning)"
    )
    own.add_argument(
        "--template-date",
        metavar="DATE",
        help="the day that the template shows, where it does (data.template_date)",
    )
    own.add_argument(
        "--single-turn",
        action="store_true",
        help="rows are a prompt and a response (data.multiturn.enable=false)",
    )
    for key in ("messages", "tools", "enable-thinking", "prompt", "response"):
        own.add_argument(
            f"--{key}-key",
            default=key.replace("-", "_"),
            help="name of the column (default %(default)s)",
        )
    own.add_argument(
        "--rows",
        metavar="FILE:FUNCTION",
        help="a function (path) -> rows of yours (data.custom_cls.path, name)",
    )
    own.add_argument(
        "--max-rows", type=int, default=-1, help="only the first rows (data.train_max_samples)"
    )
    own.add_argument("--show", type=int, help="samples to show (default 3, in a page 50)")
    own.add_argument("--html", metavar="FILE", help="write one self-contained page")
    own.add_argument(
        "--num-workers",
        type=int,
        default=2,
        help="processes (data.num_workers; default %(default)s)",
    )
    own.add_argument("--trust-remote-code", action="store_true", help="model.trust_remote_code")
    return top


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            text + """ isn't a JSON object such as {"enable_thinking": false}"""
        )
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return _audit(options)
    except (ValueError, OSError) as error:
        print(f"audit: {clean(str(error))}", file=sys.stderr)
        return 2


def _audit(options: argparse.Namespace) -> int:
    function = None
    if options.rows:
        path, colon, name = options.rows.rpartition(":")
        if not colon:
            raise ValueError(f"--rows {options.rows} names no function: give FILE:FUNCTION.")
        function = load_function(path, name)
    folder = find_model(options.model, weights=False)
    if options.drop_reasoning and options.reasoning_in_content:
        raise ValueError(
            "--drop-reasoning and --reasoning-in-content contradict each other: choose one."
        )
    tokenizer = load_tokenizer(str(folder), options.trust_remote_code)
    renderer = Renderer(
        tokenizer,
        fix_date(tokenizer, options.chat_template, options.template_date or today()),
        options.template_kwargs,
        drop_reasoning=options.drop_reasoning,
        reasoning_in_content=options.reasoning_in_content,
    )
    files = resolve_files(options.files, any_suffix=function is not None)
    on_terminal = 3 if options.show is None else options.show
    show = max(on_terminal, 50) if options.html and options.show is None else on_terminal
    with RowProgress(count_rows(files)) as progress:
        found = audit(
            files,
            renderer,
            max_length=options.max_length,
            truncation=options.truncation,
            history=options.history,
            multiturn=not options.single_turn,
            messages_key=options.messages_key,
            tools_key=options.tools_key,
            enable_thinking_key=options.enable_thinking_key,
            prompt_key=options.prompt_key,
            response_key=options.response_key,
            rows_function=function,
            max_samples=options.max_rows,
            num_workers=options.num_workers,
            show=show,
            progress=progress,
        )
    show_audit(found, Console(), on_terminal)
    for note in other_tokens(renderer.tokenizer, folder):
        print(f"note: {clean(note)}")
    if options.html:
        write_page(found, Path(options.html))
        print(f"wrote {options.html}")
    return 1 if found.tally.refused else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
