"""Analysing a table in a notebook: what a program leaves, the next one finds.

Each question has a CSV of its own, and nobody says what its columns are called. Half of the
demonstrations look first, half guess. A guess is right once in 36 times.

    python -m examples.worlds.notebook
"""

from __future__ import annotations

import random
from dataclasses import replace

from examples.worlds.learning import PYTHON, Row, World, call, main, talk
from examples.worlds.words import AMOUNTS, PLACES, TOWNS

READ = "import csv\nrows = list(csv.DictReader(open('data.csv')))"
LOOK = f"{READ}\nfor name in rows[0]: print(name)"
FIND = "print('Answer:', {}(rows, key=lambda row: int(row['{}']))['{}'])"


def make_question(draw: random.Random) -> Row:
    """A question, its answer, and the file that the interpreter's programs find."""
    columns = [draw.choice(PLACES), draw.choice(AMOUNTS)]
    rows = list(zip(draw.sample(TOWNS, 6), draw.sample(range(10, 100), 6), strict=True))
    end = draw.choice(["max", "min"])
    answer = {"max": max, "min": min}[end](rows, key=lambda row: row[1])[0]
    csv = "\n".join(f"{town},{amount}" for town, amount in [columns, *rows])
    given = {PYTHON: {"execute_kwargs": {"files": {"data.csv": csv}}}}
    about = {"tools_kwargs": given, "columns": columns, "end": end}
    return {"prompt": f"Where is the {end} ?", "answer": answer, "extra_info": about}


def demonstrate(row: Row, draw: random.Random) -> list[Row]:
    """Two cells and an answer. Without a look the columns' names are guessed."""
    columns = row["extra_info"]["columns"]
    careful = draw.random() < 0.5
    amount, place = reversed(columns) if careful else map(draw.choice, (AMOUNTS, PLACES))
    wrong = [name for name in (amount, place) if name not in columns]
    found = f"KeyError: '{wrong[0]}'" if wrong else f"Answer: {row['answer']}"
    looks = call(PYTHON, "\n".join(columns), code=LOOK)
    reads = call(PYTHON, "[no output]", code=READ)
    finds = call(PYTHON, found, code=FIND.format(row["extra_info"]["end"], amount, place))
    return talk(row["prompt"], looks if careful else reads, finds, "Unknown" if wrong else found)


def right(completion: str, ground_truth: str) -> float:
    """1 for the town, letter by letter."""
    return float(completion.rpartition("Answer: ")[2] == ground_truth)


def make_world(draw: random.Random) -> World:
    shown = [demonstrate(make_question(draw), draw) for _ in range(3200)]
    rows = [make_question(draw) for _ in range(160)]
    world = World(shown, rows[:128], rows[128:], right, [PYTHON], session=True)
    return replace(world, prompts=8, learning_rate=1e-4)


if __name__ == "__main__":
    main(make_world, __doc__)
