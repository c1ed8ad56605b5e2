"""retool in three minutes on two CPU cores: a model that knows nothing learns to use a code interpreter.

Makes conversations, a tokenizer and a tiny model from nothing; trains with the SFT command on two processes that share every
sequence; checks the checkpoint; loads its export with plain transformers, and has held-out questions answered with real tool
calls. Everything lands in `--out` (demo-run). Exit status 1 when the model hasn't learnt its tool.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded, so nothing may be tried
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from quickstart import data, evaluate, listing, training
from quickstart import model as tiny
from quickstart.code_tool import run_code
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 1
BATCH = 4
HELD_OUT = 64
SHOWN = 3
TURN_TOKENS = 40  # enough for every turn of the data
GOAL = 0.9


def main() -> int:
    """Five stages, each saying what it did."""
    arguments = parse_arguments()
    console, started = Console(highlight=False, soft_wrap=True), time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    out: Path = arguments.out
    for name in ("data", "model", "run", "cache"):
        shutil.rmtree(out / name, ignore_errors=True)

    heading(console, 1, f"Making {arguments.steps * BATCH:,} conversations, a tokenizer and a model")
    held_out = make_inputs(out, arguments.steps * BATCH, console)

    heading(console, 2, "Before training: held-out questions")
    before = ask(out / "model", held_out)
    show_score(console, before)

    heading(console, 3, "Training: two processes, each with half of every sequence")
    words = training.sft_words(out / "data/train.parquet", out / "data/test.parquet", out / "model", out / "run", arguments.steps, BATCH)
    console.print(training.shown(words), style="dim", markup=False)
    console.print(f"  (its plan and every step are in {out}/train.log)", style="dim")
    losses = training.run_sft(words, out / "train.log", console)

    heading(console, 4, "The checkpoint, complete")
    checkpoint = listing.check_run(out / "run", len(losses), 2, out / "model")
    console.print(listing.tree_of(out / "run"))

    heading(console, 5, "After training: the same questions, to huggingface/ in plain transformers")
    after = ask(checkpoint / "huggingface", held_out)
    for dialogue in after[:SHOWN]:
        show_dialogue(console, dialogue)
    console.print(comparison(before, after))
    return conclude(console, evaluate.score(after), checkpoint, time.monotonic() - started)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder for everything that is made (default: demo-run)")
    parser.add_argument("--steps", type=int, default=640, help="optimizer steps of 4 conversations (default: 640)")
    return parser.parse_args()


def make_inputs(out: Path, count: int, console: Console) -> list[data.Problem]:
    """Write data/{train,test}.parquet and model/; the held-out problems."""
    problems = data.make_problems(HELD_OUT + count, SEED)
    held_out, trained = problems[:HELD_OUT], problems[HELD_OUT:]
    (out / "data").mkdir(parents=True, exist_ok=True)
    data.write_parquet(out / "data/train.parquet", trained)
    data.write_parquet(out / "data/test.parquet", held_out)
    template = (Path(__file__).parent / "quickstart/chat.jinja").read_text()
    tokenizer = tiny.train_tokenizer(tiny.render(trained[:1000], template))
    tiny.write_tokenizer(out / "model", tokenizer, template)
    model = tiny.write_model(out / "model", tokenizer, SEED)
    console.print(f"  {out}/data   train.parquet, and test.parquet with {HELD_OUT} held-out ones")
    size = f"{model.num_parameters() / 1e6:.1f}M parameters, a vocabulary of {tokenizer.get_vocab_size():,}"
    console.print(f"  {out}/model  Qwen2 with random weights: {size}")
    return held_out


def ask(folder: Path, problems: list[data.Problem]) -> list[evaluate.Dialogue]:
    """Hold the dialogues with the model of a Hugging Face folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return evaluate.hold_dialogues(problems, evaluate.greedy(model, tokenizer, TURN_TOKENS), run_code)


def heading(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/5  {text}[/bold]")


def show_score(console: Console, dialogues: list[evaluate.Dialogue]) -> None:
    result = evaluate.score(dialogues)
    wrote = dialogues[0].messages[-1]["content"]
    console.print(f"  {result.well_formed} of {result.questions} tool calls well-formed, {result.right} answers right. It writes:")
    console.print(f"  {wrote[:100]!r}", style="dim", markup=False)


def show_dialogue(console: Console, dialogue: evaluate.Dialogue) -> None:
    """The conversation as it was, a line a message or call."""
    for message in dialogue.messages:
        style = {"user": "bold", "tool": "cyan"}.get(message["role"])
        console.print(f"  {message['role']:>9}  {message['content']}", style=style, markup=False)
        for call in message.get("tool_calls", []):
            console.print(f"  {'→ runs':>9}  {call['function']['arguments']['code']}", style="green", markup=False)
    console.print()


def comparison(before: list[evaluate.Dialogue], after: list[evaluate.Dialogue]) -> Table:
    scores = evaluate.score(before), evaluate.score(after)
    table = Table("", "before", "after", title=f"{scores[0].questions} held-out questions")
    table.add_row("tool calls well-formed", *(f"{s.well_formed / s.questions:.0%}" for s in scores))
    table.add_row("answers right", *(f"{s.right / s.questions:.0%}" for s in scores))
    return table


def conclude(console: Console, result: evaluate.Score, checkpoint: Path, seconds: float) -> int:
    learnt = result.well_formed >= GOAL * result.questions and result.right > 0
    console.print(f"\n{'It works' if learnt else 'It has NOT learnt its tool'} ({seconds:.0f} seconds).")
    if learnt:
        console.print(f"Next: the model is {checkpoint}/huggingface, the numbers {checkpoint.parent}/metrics.jsonl.")
        console.print("      Your own data and model: examples/sft_qwen2_5.sh; every key: python -m retool.sft --help", markup=False)
    return int(not learnt)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
