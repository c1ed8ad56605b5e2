"""Analysing a table in a notebook: what a program leaves, the next one finds.

Each question has a CSV of its own, and nobody says what its columns are called. Half of the
demonstrations look first, half guess. A guess is right once in 36 times.

    python -m examples.worlds.notebook
"""

from __future__ import annotations

import random
from pathlib import Path

from examples.worlds.learning import Row, World, call, main, said

TOWNS = "Basel Bonn Cairo Delft Genoa Graz Hanoi Kyoto Lima Lyon Nice Oslo Paris Riga Rome Turin".split()
PLACES = "city location place site station town".split()
AMOUNTS = "amount cost count price sales weight".split()
TURNS = "actor_rollout_ref.rollout.multi_turn"

READ = "import csv\nrows = list(csv.DictReader(open('data.csv')))"
LOOK = "for name in rows[0]: print(name)"
FIND = "print('Answer:', {}(rows, key=lambda row: int(row['{}']))['{}'])"
TOOL = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "Runs Python. Variables live on.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The program."}},
            "required": ["code"],
        },
    },
}


def run(code: str) -> Row:
    return call("code_interpreter", code=code)


class Table:
    """Towns and amounts, the names of their columns, and a question."""

    def __init__(self, draw: random.Random) -> None:
        self.place = draw.choice(PLACES)
        self.amount = draw.choice(AMOUNTS)
        self.rows = list(zip(draw.sample(TOWNS, 6), draw.sample(range(10, 100), 6), strict=True))
        self.end = draw.choice(["max", "min"])
        self.question = said("user", f"Where is the {self.end} ?")

    def csv(self) -> str:
        return "\n".join(f"{town},{n}" for town, n in [(self.place, self.amount), *self.rows])

    def answer(self) -> str:
        highest_last = sorted(self.rows, key=lambda row: row[1])
        return highest_last[-1 if self.end == "max" else 0][0]


def demonstrate(table: Table, draw: random.Random, *, looks: bool) -> list[Row]:
    """Two cells and an answer. Without a look the columns' names are guessed."""
    columns = [table.amount, table.place]
    if looks:
        names = columns
        first = [run(f"{READ}\n{LOOK}"), said("tool", "\n".join(reversed(columns)))]
    else:
        names = [draw.choice(AMOUNTS), draw.choice(PLACES)]
        first = [run(READ), said("tool", "[no output]")]
    wrong = [name for name in names if name not in columns]
    found = f"KeyError: '{wrong[0]}'" if wrong else f"Answer: {table.answer()}"
    second = [run(FIND.format(table.end, *names)), said("tool", found)]
    return [table.question, *first, *second, said("assistant", "Unknown" if wrong else found)]


def right(completion: str, ground_truth: str) -> float:
    """1 for the town, letter by letter."""
    return float(completion.rpartition("Answer: ")[2] == ground_truth)


def to_row(table: Table) -> Row:
    """A question, and the file that the interpreter's programs find."""
    given = {"execute_kwargs": {"files": {"data.csv": table.csv()}}}
    return {
        "prompt": [table.question],
        "reward_model": {"ground_truth": table.answer()},
        "data_source": "tables",
        "extra_info": {"tools_kwargs": {"code_interpreter": given}},
    }


def make_world(out: Path, seed: int) -> World:
    del out  # nothing is written
    draw = random.Random(seed)
    shown = [demonstrate(Table(draw), draw, looks=draw.random() < 0.5) for _ in range(3200)]
    return World(
        demonstrations=[{"messages": messages, "tools": [TOOL]} for messages in shown],
        questions=[to_row(Table(draw)) for _ in range(128)],
        held_out=[to_row(Table(draw)) for _ in range(32)],
        reward=right,
        tools=["code_interpreter"],
        options={
            f"{TURNS}.tool_session": True,
            # The end of a traceback says what was wrong
            f"{TURNS}.max_tool_response_length": 24,
            f"{TURNS}.tool_response_truncate_side": "left",
        },
        prompts=8,  # half as many as elsewhere: programs take their time; so smaller steps
        learning_rate=1e-4,
    )


if __name__ == "__main__":
    main(make_world, __doc__)
