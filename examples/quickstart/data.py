"""Conversations about a little shop, from templates and a seed: questions whose answers need a
program.

A problem is one or two questions in a row, the second about the first one's answer ("Then Mia sells
57. How many are left?"). For each, the assistant calls `code_interpreter`, reads what it printed
and answers in `\\boxed{}`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TOOL = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "Runs Python code.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code."}},
            "required": ["code"],
        },
    },
}

NAMES = (
    "Ada",
    "Ana",
    "Ben",
    "Eva",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Max",
    "Mia",
    "Noa",
    "Sam",
    "Tom",
    "Uma",
    "Zoe",
)
GOODS = (
    ("boxes", "pens"),
    ("bags", "apples"),
    ("shelves", "books"),
    ("trays", "eggs"),
    ("rows", "seats"),
    ("packs", "cards"),
    ("crates", "plums"),
    ("jars", "beads"),
    ("sacks", "nuts"),
    ("tins", "figs"),
    ("racks", "hats"),
    ("tubs", "shells"),
)


@dataclass(frozen=True)
class Question:
    """What the user asks, how the assistant means to find it, the program's expression, and the
    truth.
    """

    text: str
    thought: str
    expression: str
    answer: int

    @property
    def code(self) -> str:
        return f"print({self.expression})"


Problem = tuple[Question, ...]


def make_problems(count: int, seed: int) -> list[Problem]:
    """`count` problems, no two alike, so that any split of the list is clean.

    The same seed gives the same list.
    """
    rng = random.Random(seed)
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problems.setdefault(_problem(rng))
    return list(problems)


def _problem(rng: random.Random) -> Problem:
    name, (container, thing) = rng.choice(NAMES), rng.choice(GOODS)
    first = rng.choice(OPENINGS)(name, container, thing, _number(rng), _number(rng))
    questions = [first]
    for _ in range(rng.randrange(SEQUEL_MAX + 1)):
        questions.append(rng.choice(SEQUELS)(name, questions[-1].answer, _number(rng)))
    return tuple(questions)


def _contained(name: str, container: str, thing: str, a: int, b: int) -> Question:
    text = f"{name} has {a} {container} with {b} {thing} each. How many {thing}?"
    return Question(text, "I multiply them.", f"{a}*{b}", a * b)


def _coloured(name: str, container: str, thing: str, a: int, b: int) -> Question:
    text = f"{name} has {a} red {thing} and {b} blue {thing}. How many {thing}?"
    return Question(text, "I add them.", f"{a}+{b}", a + b)


def _daily(name: str, container: str, thing: str, a: int, b: int) -> Question:
    text = f"{name} fills {a} {container} a day for {b} days. How many {container}?"
    return Question(text, "I multiply them.", f"{a}*{b}", a * b)


def _bought(name: str, before: int, c: int) -> Question:
    return Question(
        f"Then {name} buys {c} more. How many now?", "I add them.", f"{before}+{c}", before + c
    )


def _sold(name: str, before: int, c: int) -> Question:
    return Question(
        f"Then {name} sells {c}. How many are left?",
        "I take them away.",
        f"{before}-{c}",
        before - c,
    )


OPENINGS = (_contained, _coloured, _daily)
SEQUELS = (_bought, _sold)
SEQUEL_MAX = 1


def _number(rng: random.Random) -> int:
    return rng.randint(11, 99)


def to_row(problem: Problem, source: str) -> dict[str, Any]:
    """A problem as a row of the training file: `messages`, `tools`, `answer` (the last one),
    `source`.
    """
    messages: list[dict[str, Any]] = []
    for question in problem:
        call = {
            "type": "function",
            "function": {"name": TOOL["function"]["name"], "arguments": {"code": question.code}},
        }
        messages += [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": question.thought, "tool_calls": [call]},
            {"role": "tool", "content": str(question.answer)},
            {"role": "assistant", "content": f"The answer is \\boxed{{{question.answer}}}."},
        ]
    return {
        "messages": messages,
        "tools": [TOOL],
        "answer": str(problem[-1].answer),
        "source": source,
    }


def write_parquet(path: Path, problems: Sequence[Problem]) -> None:
    """One row a problem.

    Fields that only some messages have (`tool_calls`) are null in the others, as parquet stores
    them.
    """
    pq.write_table(
        pa.Table.from_pylist(
            [to_row(problem, f"shop/{path.stem}/{i}") for i, problem in enumerate(problems)]
        ),
        path,
    )


def unasked(problems: Sequence[Problem], others: Sequence[Problem]) -> list[Problem]:
    """Those problems whose first question none of the others has, nor one before."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem[0].text, problem)
    asked = {problem[0].text for problem in others}
    return [problem for text, problem in first.items() if text not in asked]


def to_question(problem: Problem, source: str) -> dict[str, Any]:
    """A problem's first question as a row for reinforcement learning: asked, not answered."""
    question = problem[0]
    prompt = [{"role": "user", "content": question.text}]
    judged = {"style": "rule", "ground_truth": str(question.answer)}
    return {
        "data_source": "shop",
        "prompt": prompt,
        "ability": "",
        "reward_model": judged,
        "extra_info": {"source": source},
    }


def write_questions(path: Path, problems: Sequence[Problem]) -> None:
    """One row a problem."""
    pq.write_table(
        pa.Table.from_pylist(
            [to_question(problem, f"shop/{path.stem}/{i}") for i, problem in enumerate(problems)]
        ),
        path,
    )
