"""Rows a second that one core renders and tokenises, against one pass of transformers.

    python benchmarks/rendering.py ROWS TOKENIZER [--templates hermes FILE …] [--rows 512]

The baseline is `tokenizer.apply_chat_template(messages, tools, tokenize=True)`: one pass over each
conversation, with neither a mask nor a check. *render* gives tokens and mask of checked rows,
*dataset* is all of what a run does with a row but writing it (Arrow to Python, checks, render,
truncation, counts), *audit* what the audit does. A processor's seconds of this one process, not the
clock's: median of the repeats. A template that refuses every row has no line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from table import hardware, head, row, save

from retool.data.audit.counts import tally_chunk
from retool.data.read.rows import to_conversation
from retool.data.read.source import RowSource
from retool.data.render.renderer import Renderer, make_renderer
from retool.data.render.rendering import Rendering
from retool.data.tokenise import LengthLimit, tokenise_chunk
from retool.data.tokens.load import load_tokenizer

LIMIT = LengthLimit(1 << 20)


def rows_a_second(work: Callable[[], object], rows: int, repeats: int) -> float:
    """The median over the repeats, after one for warming up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return rows / statistics.median(seconds)


def measured(source: RowSource, renderer: Renderer, repeats: int) -> dict[str, float]:
    """Rows a second of each way; ValueError where the template refuses a row."""
    chunks = list(source.chunks())
    conversations = [
        to_conversation(raw, chunk.file, index, source.form)
        for chunk in chunks
        for index, raw in chunk
        if isinstance(raw, dict)
    ]
    tokenise = partial(tokenise_chunk, renderer=renderer, form=source.form, limit=LIMIT)
    audit = partial(
        tally_chunk, renderer=renderer, form=source.form, prompts=False, limit=LIMIT, show=3
    )

    def one_pass(entry: Any) -> None:
        renderer.tokenizer.apply_chat_template(
            entry.messages, tools=entry.tools, chat_template=renderer.template, tokenize=True
        )

    ways: dict[str, Callable[[], object]] = {
        "transformers": lambda: [one_pass(entry) for entry in conversations],
        "render": lambda: [renderer.render(entry) for entry in conversations],
        "dataset": lambda: [tokenise(chunk) for chunk in chunks],
        "audit": lambda: [audit(chunk) for chunk in chunks],
    }
    return {name: rows_a_second(work, len(conversations), repeats) for name, work in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="conversations, as data.train_files names them")
    parser.add_argument("tokenizer", help="folder of a tokenizer")
    parser.add_argument("--templates", nargs="*", default=["hermes"], help="beside its own")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cpu")
    head(
        f"{hardware(device)}; the first {args.rows:,} rows of {args.data}; rows a second on a core",
        ["template", "transformers, one pass", "render", "dataset", "audit"],
    )
    lines = list[dict[str, Any]]()
    for template in (None, *args.templates):
        name = "its own" if template is None else Path(template).stem
        rendering = Rendering(chat_template=template, history="last")
        source = RowSource(args.data, max_rows=args.rows)
        try:
            renderer = make_renderer(load_tokenizer(args.tokenizer), rendering)
            speeds = measured(source, renderer, args.repeats)
        except ValueError as error:
            print(f"| {name}: {str(error)[:100]} |")
            continue
        row([name, *(f"{speed:,.0f}" for speed in speeds.values())])
        lines.append({"template": name, **speeds})
        save(args.json, device, lines)


if __name__ == "__main__":
    main()
