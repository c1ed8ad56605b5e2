"""What the three worlds share: a tiny model from nothing, SFT, reinforcement learning, a table.

A world is rows and functions of the script's own; everything else is `retool.sft` and `retool.rl`.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from retool.rl.agent.tools.interpreter import SCHEMA
from retool.rl.agent.tools.session import SESSION_SCHEMA

TEMPLATE = Path(__file__).resolve().parents[1] / "quickstart/chat.jinja"
PYTHON = "code_interpreter"
SAMPLES = 4  # answers to each held-out question, drawn at temperature 1
SEEN = 1000  # conversations whose words the tokenizer learns

ROLLOUT = "actor_rollout_ref.rollout"
NOTEBOOK = {
    f"{ROLLOUT}.multi_turn.tool_session": True,
    # The end of a traceback says what was wrong
    f"{ROLLOUT}.multi_turn.max_tool_response_length": 24,
    f"{ROLLOUT}.multi_turn.tool_response_truncate_side": "left",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Conversations to imitate, questions to practise on and to be tested with, and what answers the
    model and judges it. Numbers of steps are those after which it has learnt.

    `session`: the code interpreter's variables live on between the calls of an answer.
    """

    demonstrations: Sequence[list[Row]]
    questions: Sequence[Row]
    held_out: Sequence[Row]
    reward: Callable[..., Any] | None = None
    tools: Sequence[Any] | None = None
    environment: Callable[..., Any] | None = None
    session: bool = False
    sft_steps: int = 400
    rl_steps: int = 15
    learning_rate: float = 3e-4  # of reinforcement learning
    # Questions of such a step. Programs take their time: a notebook has fewer, so smaller steps
    prompts: int = 16

    def conversations(self) -> list[Row]:
        """The demonstrations as rows of SFT: what was said, and what could be called."""
        of_python = SESSION_SCHEMA if self.session else SCHEMA
        schemas = [of_python if tool == PYTHON else tool.schema for tool in self.tools or ()]
        return [
            {"messages": messages, "tools": schemas or None} for messages in self.demonstrations
        ]


def main(make_world: Callable[[random.Random], World], description: str | None) -> None:
    """The command line of a world. `make_world` draws all that is random in it."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    folder = Path(f"{Path(sys.argv[0]).stem}-run")
    parser.add_argument("--out", type=Path, default=folder, help=f"folder of the run ({folder})")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another run")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # of saving the model
    world = make_world(random.Random(given.seed))
    show(learn(world, given.out, given.seed))


def learn(world: World, out: Path, seed: int) -> list[float]:
    """Mean scores of the held-out questions: of random weights, after SFT, after RL."""
    print(f"A tokenizer and a model of random weights: {out}/model")
    shown = world.conversations()
    model = make_model(out / "model", shown, seed)
    untrained = improve(world, model, out / "untrained", seed, steps=0)
    print(f"SFT: {world.sft_steps} steps on {len(shown):,} demonstrations")
    tuned = retool.sft(
        model,
        shown,
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
    options = {f"{ROLLOUT}.val_kwargs.n": SAMPLES, "trainer.val_only": steps == 0}
    if world.session:
        options |= NOTEBOOK
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
        options=options,
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


def talk(*parts: str | list[Row]) -> list[Row]:
    """A conversation: texts of the user and of the assistant in turns, and calls between them."""
    messages: list[Row] = []
    for part in parts:
        if isinstance(part, str):
            users = not messages or messages[-1]["role"] == "assistant"
            part = [{"role": "user" if users else "assistant", "content": part}]
        messages += part
    return messages


def call(name: str, result: str, **arguments: str) -> list[Row]:
    """The assistant's call of a tool, and what that said."""
    called = {"type": "function", "function": {"name": name, "arguments": arguments}}
    asks = {"role": "assistant", "content": "", "tool_calls": [called]}
    return [asks, {"role": "tool", "content": result}]
