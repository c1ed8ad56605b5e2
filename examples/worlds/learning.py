"""What the three worlds share: a tiny model from nothing, SFT, reinforcement learning, a table.

A world is rows and functions of the script's own; everything else is `retool.sft` and `retool.rl`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded, so nothing may be tried
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.table import Table
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

import retool
from examples.quickstart import model as tiny

TEMPLATE = Path(__file__).resolve().parents[1] / "quickstart/chat.jinja"
SAMPLES = 4  # answers to each held-out question, drawn at temperature 1
SEEN = 1000  # conversations whose words the tokenizer learns

Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Conversations to imitate, questions to practise on and to be tested with, and what answers the
    model and judges it. Numbers of steps are those after which it has learnt.
    """

    demonstrations: Sequence[Row]
    questions: Sequence[Row]
    held_out: Sequence[Row]
    reward: Callable[..., Any] | None = None
    tools: Sequence[Any] | None = None
    environment: Callable[..., Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    sft_steps: int = 400
    rl_steps: int = 15
    learning_rate: float = 3e-4  # of reinforcement learning
    prompts: int = 16  # of a step of reinforcement learning


def main(make_world: Callable[[Path, int], World], description: str | None) -> None:
    """The command line of a world."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    folder = Path(f"{Path(sys.argv[0]).stem}-run")
    parser.add_argument("--out", type=Path, default=folder, help=f"folder of the run ({folder})")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another run")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # of saving the model
    show(learn(make_world(given.out, given.seed), given.out, given.seed))


def learn(world: World, out: Path, seed: int) -> list[float]:
    """Mean scores of the held-out questions: of random weights, after SFT, after RL."""
    print(f"A tokenizer and a model of random weights: {out}/model")
    model = make_model(out / "model", world.demonstrations, seed)
    untrained = improve(world, model, out / "untrained", seed, steps=0)
    print(f"SFT: {world.sft_steps} steps on {len(world.demonstrations):,} demonstrations")
    tuned = retool.sft(
        model,
        world.demonstrations,
        output_dir=out / "sft",
        learning_rate=1e-3,
        batch_size=8,
        max_steps=world.sft_steps,
        max_length=512,
        device="cpu",
        seed=seed,
        resume=False,
        quiet=True,
    )
    assert tuned.model is not None
    print(
        f"Reinforcement learning: {world.rl_steps} steps of {world.prompts} questions × 8 answers"
    )
    better = improve(world, tuned.model, out / "rl", seed, steps=world.rl_steps)
    return [*held_out_scores(untrained), *held_out_scores(better)]


def improve(world: World, model: Path, folder: Path, seed: int, *, steps: int) -> retool.Result:
    """Reinforcement learning in a world, the held-out questions before and after; 0 steps: they alone."""
    sampled = {"actor_rollout_ref.rollout.val_kwargs.n": SAMPLES, "trainer.val_only": steps == 0}
    return retool.rl(
        model,
        world.questions,
        reward=world.reward,
        tools=world.tools,
        environment=world.environment,
        eval_prompts=world.held_out,
        output_dir=folder,
        learning_rate=world.learning_rate,
        batch_size=world.prompts,
        num_generations=8,
        max_prompt_length=256,
        max_completion_length=384,
        max_steps=max(steps, 1),
        eval_steps=max(steps, 1),
        device="cpu",
        seed=seed,
        resume=False,
        quiet=True,
        on_step=tell,
        options={**sampled, **world.options},
    )


def tell(step: int, metrics: Mapping[str, Any]) -> None:
    """A line for each step: what its answers scored."""
    if "critic/score/mean" in metrics:
        print(f"  step {step:2d}  mean score {metrics['critic/score/mean']:.2f}")


def held_out_scores(result: retool.Result) -> list[float]:
    """The mean score of the held-out questions, each time that it was measured."""
    ending = f"/acc/mean@{SAMPLES}"
    entries = [entry for entry in result.metrics if any(key.endswith(ending) for key in entry)]
    return [next(entry[key] for key in entry if key.endswith(ending)) for entry in entries]


def show(scores: Sequence[float]) -> None:
    """The closing table."""
    table = Table("held-out questions", "untrained", "after SFT", "after RL")
    table.add_row("answers right", *(f"{score:.0%}" for score in scores))
    Console().print(table)


def make_model(folder: Path, rows: Sequence[Row], seed: int) -> Path:
    """A tokenizer that knows the words of `rows`, and a Qwen2 of 1.1M random parameters."""
    template = TEMPLATE.read_text()
    texts: list[str] = []
    for row in rows[:SEEN]:
        shown = {"conversations": [row["messages"]], "tools": row.get("tools")}
        texts += render_jinja_template(chat_template=template, **shown)[0]
    tokenizer = tiny.train_tokenizer(texts)
    tiny.write_tokenizer(folder, tokenizer, template)
    tiny.write_model(folder, tokenizer, seed)
    return folder


def said(role: str, text: str) -> Row:
    """A message."""
    return {"role": role, "content": text}


def call(name: str, **arguments: str) -> Row:
    """The assistant's call of a tool."""
    function = {"name": name, "arguments": arguments}
    return {**said("assistant", ""), "tool_calls": [{"type": "function", "function": function}]}
