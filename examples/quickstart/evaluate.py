"""Held-out problems put to a model with plain transformers: it calls the code tool for real, and
the answers are counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.quickstart.data import TOOL, Problem
from examples.quickstart.model import TURN_END

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
BOXED = re.compile(r"\\boxed\{(-?\d+)\}")
MAX_CALLS = 3  # for one question

Message = dict[str, Any]
# Conversations → the model's next turn in each, as it wrote it
Generate = Callable[[Sequence[Sequence[Message]]], list[str]]


@dataclass
class Dialogue:
    """A problem being worked on: what was said so far, and how each question went."""

    problem: Problem
    messages: list[Message] = field(default_factory=list)
    asked: int = 0
    calls: int = 0  # for the question at hand
    well_formed: int = 0  # questions whose first turn was a well-formed call
    right: int = 0
    open: bool = True

    def ask(self) -> None:
        """Put the next question; without one the dialogue is over."""
        if self.asked == len(self.problem):
            self.open = False
            return
        self.messages.append({"role": "user", "content": self.problem[self.asked].text})
        self.asked = self.asked + 1
        self.calls = 0


@dataclass(frozen=True)
class Score:
    """Counts over all questions of all dialogues.

    A question that a dialogue never reached counts as missed.
    """

    questions: int
    well_formed: int
    right: int


def parse_turn(text: str) -> Message | None:
    """The assistant's turn as a message: with `tool_calls`, or an answer; None when it isn't
    well-formed.

    Well-formed: the turn was ended, tags are paired, and a call is the JSON object of
    `code_interpreter` with a string `code`.
    """
    content, ended, _ = text.partition(TURN_END)
    calls = CALL.findall(content)
    rest = CALL.sub("", content)
    if not ended or "tool_call>" in rest:
        return None
    parsed = [_parse_call(call) for call in calls]
    if None in parsed:
        return None
    message: Message = {"role": "assistant", "content": rest.strip()}
    return {**message, "tool_calls": parsed} if parsed else message


def _parse_call(text: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except json.JSONDecodeError:
        return None
    if (
        not isinstance(call, dict)
        or set(call) != {"name", "arguments"}
        or call["name"] != TOOL["function"]["name"]
    ):
        return None
    arguments = call["arguments"]
    if (
        not isinstance(arguments, dict)
        or set(arguments) != {"code"}
        or not isinstance(arguments["code"], str)
    ):
        return None
    return {"type": "function", "function": call}


def hold_dialogues(
    problems: Sequence[Problem], generate: Generate, run_code: Callable[[str], str]
) -> list[Dialogue]:
    """Work through all problems side by side, one model turn in each at a time, until every
    dialogue is over.
    """
    dialogues = [Dialogue(problem) for problem in problems]
    for dialogue in dialogues:
        dialogue.ask()
    while active := [dialogue for dialogue in dialogues if dialogue.open]:
        for dialogue, text in zip(active, generate([d.messages for d in active]), strict=True):
            take_turn(dialogue, text, run_code)
    return dialogues


def take_turn(dialogue: Dialogue, text: str, run_code: Callable[[str], str]) -> None:
    """Enter one turn of the model: run its calls, or judge its answer and ask on.

    A malformed turn ends the dialogue.
    """
    message = parse_turn(text)
    dialogue.messages.append(message or {"role": "assistant", "content": text})
    if message is None:
        dialogue.open = False
    elif calls := message.get("tool_calls"):
        dialogue.well_formed += dialogue.calls == 0
        dialogue.calls += len(calls)
        dialogue.open = dialogue.calls <= MAX_CALLS
        for call in calls:
            dialogue.messages.append(
                {"role": "tool", "content": run_code(call["function"]["arguments"]["code"])}
            )
    else:
        answers = BOXED.findall(message["content"])
        dialogue.right += (
            bool(answers) and int(answers[-1]) == dialogue.problem[dialogue.asked - 1].answer
        )
        dialogue.ask()


def score(dialogues: Sequence[Dialogue]) -> Score:
    """Sum up finished dialogues."""
    return Score(
        sum(len(d.problem) for d in dialogues),
        sum(d.well_formed for d in dialogues),
        sum(d.right for d in dialogues),
    )


def greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Generate:
    """Greedy turns of a transformers model for many conversations at once (left padding, KV cache)."""
    import torch

    tokenizer.padding_side = "left"

    def generate(conversations: Sequence[Sequence[Message]]) -> list[str]:
        inputs = tokenizer.apply_chat_template(
            [list(messages) for messages in conversations],
            tools=[TOOL],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        return tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False
        )

    return generate
