"""retool in a few minutes on two CPU cores: a model that knows nothing learns to use a code
interpreter.

Makes conversations, a tokenizer and a tiny model from nothing; trains with the SFT command on two
processes that share every sequence; checks the checkpoint; loads its export with plain
transformers, and has held-out questions answered with real tool calls. Then reinforcement learning
(DAPO, programs in the sandbox) goes on from the SFT's checkpoint of a third of the way, where the
model still gets about half wrong: at the SFT's end there would be nothing left to learn. Everything
lands in `--out` (demo-run). Exit status 1 when the model hasn't learnt its tool, or reinforcement
learning hasn't made it better.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded, so nothing may be tried
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from quickstart import code_tool, data, evaluate, improving, listing, training
from quickstart import model as tiny
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 1
BATCH = 4
HELD_OUT = 64
SHOWN = 3
TURN_TOKENS = 40  # enough for every turn of the data
GOAL = 0.9
RL_QUESTIONS = 640  # that no conversation of the SFT begins with
RL_GAIN = 0.1  # in the share of right answers to held-out questions


def main() -> int:
    """Seven stages, each saying what it did."""
    arguments = parse_arguments()
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    out: Path = arguments.out
    for name in ("data", "model", "run", "rl", "cache"):
        shutil.rmtree(out / name, ignore_errors=True)

    heading(
        console, 1, f"Making {arguments.steps * BATCH:,} conversations, a tokenizer and a model"
    )
    held_out = make_inputs(out, arguments.steps * BATCH, console)

    heading(console, 2, "Before training: held-out questions")
    before = ask(out / "model", held_out)
    show_score(console, before)

    heading(console, 3, "Training: two processes, each with half of every sequence")
    early = max(1, arguments.steps * 5 // 16)
    data_files = out / "data/train.parquet", out / "data/test.parquet"
    words = training.sft_words(
        *data_files, out / "model", out / "run", arguments.steps, BATCH, early
    )
    run_command(console, words, out / "train.log", training.loss_line)

    heading(console, 4, "The checkpoint, complete")
    checkpoint = listing.check_run(out / "run", arguments.steps, 2, out / "model")
    console.print(listing.tree_of(checkpoint))

    heading(console, 5, "After training: the same questions, to huggingface/ in plain transformers")
    after = ask(checkpoint / "huggingface", held_out)
    for dialogue in after[:SHOWN]:
        show_dialogue(console, dialogue)
    console.print(comparison(before, after))
    if not arguments.rl_steps:
        return conclude(
            console, evaluate.score(after), None, checkpoint, time.monotonic() - started
        )

    heading(
        console,
        6,
        (
            f"Reinforcement learning, from the SFT's checkpoint of step {early}: DAPO on questions without "
            "answers"
        ),
    )
    words = improving.rl_words(
        out / "data/questions.parquet",
        out / "data/held_out.parquet",
        out / "tools.yaml",
        out / f"run/global_step_{early}/huggingface",
        out / "rl",
        arguments.rl_steps,
        SEED,
    )
    calls = improving.training_calls(
        run_command(console, words, out / "rl.log", improving.step_line)
    )

    heading(
        console,
        7,
        f"Held-out questions, {improving.HELD_OUT_SAMPLES} answers each, sampled at temperature 1",
    )
    gains = show_gains(console, out / "rl", early, arguments.rl_steps, calls)
    return conclude(console, evaluate.score(after), gains, checkpoint, time.monotonic() - started)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-run"),
        help="folder for everything that is made (default: demo-run)",
    )
    parser.add_argument(
        "--steps", type=int, default=640, help="optimizer steps of 4 conversations (default: 640)"
    )
    parser.add_argument(
        "--rl-steps",
        type=int,
        default=30,
        help="steps of reinforcement learning afterwards; 0 = none (default: 30)",
    )
    return parser.parse_args()


def make_inputs(out: Path, count: int, console: Console) -> list[data.Problem]:
    """Write data/{train,test,questions,held_out}.parquet, tools.yaml and model/; the held-out
    problems.
    """
    problems = data.make_problems(HELD_OUT + count + 2 * RL_QUESTIONS, SEED)
    held_out = problems[:HELD_OUT]
    trained = problems[HELD_OUT : HELD_OUT + count]
    (out / "data").mkdir(parents=True, exist_ok=True)
    data.write_parquet(out / "data/train.parquet", trained)
    data.write_parquet(out / "data/test.parquet", held_out)
    data.write_questions(out / "data/held_out.parquet", held_out)
    unasked = data.unasked(problems[HELD_OUT + count :], problems[: HELD_OUT + count])
    data.write_questions(out / "data/questions.parquet", unasked[:RL_QUESTIONS])
    improving.write_tools(
        out / "tools.yaml",
        code_tool.isolation(),
        code_tool.SECONDS,
        code_tool.MEMORY_MB,
        code_tool.WORKERS,
    )
    template = (Path(__file__).parent / "quickstart/chat.jinja").read_text()
    tokenizer = tiny.train_tokenizer(tiny.render(trained[:1000], template))
    tiny.write_tokenizer(out / "model", tokenizer, template)
    model = tiny.write_model(out / "model", tokenizer, SEED)
    console.print(
        f"  {out}/data   train.parquet, and test.parquet with {HELD_OUT} held-out ones; {RL_QUESTIONS} "
        "questions without answers"
    )
    console.print(
        f"  {out}/tools.yaml  the code interpreter: the embedded sandbox, isolation {code_tool.isolation()}"
    )
    size = f"{model.num_parameters() / 1e6:.1f}M parameters, a vocabulary of {tokenizer.get_vocab_size():,}"
    console.print(f"  {out}/model  Qwen2 with random weights: {size}")
    return held_out


def ask(folder: Path, problems: list[data.Problem]) -> list[evaluate.Dialogue]:
    """Hold the dialogues with the model of a Hugging Face folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return evaluate.hold_dialogues(
        problems, evaluate.greedy(model, tokenizer, TURN_TOKENS), code_tool.run_code
    )


def run_command(
    console: Console,
    words: Sequence[str],
    log: Path,
    line: Callable[[Sequence[training.Step]], str | None],
) -> list[training.Step]:
    """Show the command line, run it, show it learn."""
    console.print(training.shown(words), style="dim", markup=False)
    console.print(f"  (its plan and every step are in {log})", style="dim")
    return training.run(words, log, console, line)


def heading(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/7  {text}[/bold]")


def show_score(console: Console, dialogues: list[evaluate.Dialogue]) -> None:
    result = evaluate.score(dialogues)
    wrote = dialogues[0].messages[-1]["content"]
    console.print(
        f"  {result.well_formed} of {result.questions} tool calls well-formed, {result.right} answers "
        "right. It writes:"
    )
    console.print(f"  {wrote[:100]!r}", style="dim", markup=False)


def show_dialogue(console: Console, dialogue: evaluate.Dialogue) -> None:
    """The conversation as it was, a line a message or call."""
    for message in dialogue.messages:
        style = {"user": "bold", "tool": "cyan"}.get(message["role"])
        console.print(f"  {message['role']:>9}  {message['content']}", style=style, markup=False)
        for call in message.get("tool_calls", []):
            console.print(
                f"  {'→ runs':>9}  {call['function']['arguments']['code']}",
                style="green",
                markup=False,
            )
    console.print()


def comparison(before: list[evaluate.Dialogue], after: list[evaluate.Dialogue]) -> Table:
    scores = evaluate.score(before), evaluate.score(after)
    table = Table("", "before", "after", title=f"{scores[0].questions} held-out questions")
    table.add_row("tool calls well-formed", *(f"{s.well_formed / s.questions:.0%}" for s in scores))
    table.add_row("answers right", *(f"{s.right / s.questions:.0%}" for s in scores))
    return table


def show_gains(
    console: Console, run: Path, early: int, steps: int, calls: int
) -> tuple[improving.Answers, improving.Answers]:
    """One question's answer before and after, and the closing table of reinforcement learning."""
    transcripts = (improving.read_answers(run, 0), improving.read_answers(run, steps))
    pair = improving.changed(*transcripts)
    if pair is not None:
        for name, transcript in zip(("before", "after"), pair, strict=True):
            asked = transcript["prompt"].removeprefix("user: ")
            console.print(
                f"  {name}, reward {transcript['reward']:g}: {asked}", style="bold", markup=False
            )
            for segment in transcript["segments"]:
                console.print(
                    indented(segment["text"]),
                    style="cyan" if segment["role"] == "tool" else None,
                    markup=False,
                )
    before = improving.count(transcripts[0])
    after = improving.count(transcripts[1])
    table = Table(
        "",
        f"SFT, step {early}",
        f"and {steps} steps of DAPO",
        title=f"{before.answers} answers to held-out questions",
    )
    table.add_row("sampled answers right", *(f"{a.right / a.answers:.0%}" for a in (before, after)))
    table.add_row("mean reward", *(f"{a.reward:.2f}" for a in (before, after)))
    table.add_row("tool calls", *(f"{a.calls}" for a in (before, after)))
    table.add_row("of them malformed", *(f"{a.malformed}" for a in (before, after)))
    console.print(table)
    console.print(
        f"  {calls:,} tool calls were trained on. Every answer: python -m retool.report {run}"
    )
    return before, after


def indented(text: str) -> str:
    return "\n".join(f"  │ {line}" for line in text.strip("\n").splitlines())


def conclude(
    console: Console,
    result: evaluate.Score,
    gains: tuple[improving.Answers, improving.Answers] | None,
    checkpoint: Path,
    seconds: float,
) -> int:
    learnt = result.well_formed >= GOAL * result.questions and result.right > 0
    better = gains is None or gains[1].right - gains[0].right >= RL_GAIN * gains[0].answers
    if not learnt:
        said = "It has NOT learnt its tool"
    elif not better:
        said = "Reinforcement learning has NOT made it better"
    else:
        said = "It works"
    console.print(f"\n{said} ({seconds:.0f} seconds).")
    if learnt and better:
        console.print(
            f"Next: the model is {checkpoint}/huggingface, "
            f"the numbers {checkpoint.parent}/metrics.jsonl."
        )
        console.print(
            "      Your own data and model: examples/sft_qwen2_5.sh; "
            "every key: python -m retool.{sft,rl} --help",
            markup=False,
        )
    return int(not (learnt and better))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
