"""`python -m retool.data audit FILES --model M`: check a dataset without a GPU.

Exit status 0 when every row can be used, 1 when any is refused, 2 when the audit can't run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from retool.config.command import exit_status, in_own_words
from retool.data.audit.audit import audit, count_rows
from retool.data.audit.page import page
from retool.data.audit.terminal import RowProgress, clean, show_audit
from retool.data.read.library import Part
from retool.data.read.row_format import AUTO, FORMATS, RowFormat
from retool.data.read.source import RowSource
from retool.data.render.renderer import make_renderer
from retool.data.render.rendering import HISTORIES, INLINE_OUTPUTS, Rendering
from retool.data.tokenise import TRUNCATIONS, LengthLimit
from retool.data.tokens.load import load_tokenizer, other_tokens
from retool.files.html import write_page
from retool.model.hub import find_model

PROGRAM = "python -m retool.data"
EXAMPLE = (
    "example: python -m retool.data audit train.parquet --model Qwen/Qwen2.5-0.5B-Instruct "
    "--max-length 16384 --html audit.html"
)
# What a run's keys are called here, in errors
OPTIONS = {
    "data.chat_template": "--chat-template",
    "data.custom_cls.path, name": "--rows",
    "data.format": "--format",
    "data.max_length": "--max-length",
    "data.multiturn.enable_thinking_key": "--enable-thinking-key",
    "data.multiturn.messages_key": "--messages-key",
    "data.multiturn.tools_key": "--tools-key",
    "data.name": "--name",
    "data.num_workers": "--num-workers",
    "data.prompt_key": "--prompt-key",
    "data.response_key": "--response-key",
    "model.trust_remote_code=true": "--trust-remote-code",
}


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line; each option's key in a training run is in its help."""
    top = argparse.ArgumentParser(prog=program, description="Datasets of conversations.")
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
        help="files, folders, globs, URLs, data sets of the hub (data.train_files)",
    )
    own.add_argument(
        "--model",
        required=True,
        help="folder or hub id with the tokenizer (model.partial_pretrain)",
    )
    _add_rendering(own)
    _add_rows(own)
    own.add_argument("--show", type=int, help="samples to show (default 3, in a page 50)")
    own.add_argument("--html", metavar="FILE", help="write one self-contained page")
    own.add_argument(
        "--num-workers",
        type=int,
        help="processes (data.num_workers; default: the cores, 16 at most)",
    )
    own.add_argument("--trust-remote-code", action="store_true", help="model.trust_remote_code")
    return top


def _add_rendering(own: argparse.ArgumentParser) -> None:
    """Options of how conversations become tokens, and how many."""
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
        help="what becomes of longer ones (data.truncation; default %(default)s)",
    )
    own.add_argument(
        "--history",
        choices=HISTORIES,
        default="error",
        help="templates that rewrite history (data.multiturn.history; default %(default)s)",
    )
    own.add_argument(
        "--inline-outputs",
        choices=INLINE_OUTPUTS,
        default="error",
        help="<interpreter>…</interpreter> in assistants' texts (data.multiturn.inline_outputs; "
        "default %(default)s)",
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
        type=_date,
        metavar="DATE",
        help="the day that the template shows, where it does (data.template_date)",
    )


def _add_rows(own: argparse.ArgumentParser) -> None:
    """Options of which rows are read, and from which columns."""
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
    own.add_argument("--format", choices=FORMATS, default=AUTO, help="what rows are (data.format)")
    own.add_argument("--split", help="of a data set with several (data.train_split)")
    own.add_argument("--name", help="configuration of a data set of the hub (data.name)")
    own.add_argument(
        "--rows",
        metavar="FILE:FUNCTION",
        help="a function (path) -> rows of yours (data.custom_cls.path, name)",
    )
    own.add_argument(
        "--max-rows",
        type=int,
        default=-1,
        help="only the first rows (data.train_max_samples; default %(default)s: all)",
    )


def _date(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no date: write it as 2026-11-29") from error
    return text


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


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the audit; returns the exit status."""
    options = parser(program).parse_args(arguments)
    try:
        return _audit(options)
    except (ValueError, OSError) as error:
        print(f"audit: {clean(in_own_words(error, OPTIONS))}", file=sys.stderr)
        return 2


def _audit(options: argparse.Namespace) -> int:
    rows = _rows(options)
    rendering = _rendering(options)
    limit = LengthLimit(options.max_length, options.truncation)
    folder = find_model(options.model, weights=False)
    renderer = make_renderer(load_tokenizer(str(folder), options.trust_remote_code), rendering)
    on_terminal = 3 if options.show is None else options.show
    show = max(on_terminal, 50) if options.html and options.show is None else on_terminal
    with RowProgress(count_rows(rows.paths)) as progress:
        found = audit(
            rows,
            renderer,
            limit,
            num_workers=options.num_workers,
            show=show,
            progress=progress,
        )
    show_audit(found, Console(), on_terminal)
    for note in other_tokens(renderer.tokenizer, folder):
        print(f"note: {clean(note)}")
    if options.html:
        write_page(page(found, options.model), Path(options.html), "--html audit.html")
        print(f"wrote {options.html}")
    return 1 if found.tally.refused else 0


def _rows(options: argparse.Namespace) -> RowSource:
    """Which rows the command line asks for."""
    path, colon, name = (options.rows or "").rpartition(":")
    if options.rows and not colon:
        raise ValueError(f"--rows {options.rows} names no function: give FILE:FUNCTION.")
    form = RowFormat(
        multiturn=not options.single_turn,
        messages_key=options.messages_key,
        tools_key=options.tools_key,
        enable_thinking_key=options.enable_thinking_key,
        prompt_key=options.prompt_key,
        response_key=options.response_key,
        format=options.format,
    )
    part = Part(options.split, options.name, "--split")
    return RowSource(options.files, form, path or None, name or None, options.max_rows, part)


def _rendering(options: argparse.Namespace) -> Rendering:
    """How the command line wants them rendered."""
    if options.drop_reasoning and options.reasoning_in_content:
        raise ValueError(
            "--drop-reasoning and --reasoning-in-content contradict each other: choose one."
        )
    return Rendering(
        chat_template=options.chat_template,
        template_kwargs=options.template_kwargs,
        template_date=options.template_date,
        drop_reasoning=options.drop_reasoning,
        reasoning_in_content=options.reasoning_in_content,
        history=options.history,
        inline_outputs=options.inline_outputs,
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
