"""Searching a corpus: where was the author of a book born? That takes two searches.

Half of the demonstrations stop after the first one, so SFT learns to stop there half of the time.
Reinforcement learning finds out what pays.

    python -m examples.worlds.search
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from examples.worlds.learning import Row, World, call, main, said

COLOURS = "Amber Black Blue Brown Coral Crimson Gold Green Grey Ivory Jade Lilac Navy Olive Pink Red".split()
THINGS = "Bridge Candle Door Field Forest Garden Harbour Hill House Island Key Lake Lamp Moon River Ship".split()
FIRST = "Ada Ben Cleo Dov Eva Finn Gina Hugo Ida Jon Kira Leo Mia Noa Otto Pia".split()
LAST = "Berg Cole Dahl Eck Frost Gray Holm Iver Kern Lund Moss Nash Olsen Park Reed Stone".split()
TOWNS = "Basel Bonn Cairo Delft Genoa Graz Hanoi Kyoto Lima Lyon Nice Oslo Paris Riga Rome Turin".split()

Fact = tuple[str, str, str]  # a book, its author, the author's birthplace


def make_facts(draw: random.Random) -> list[Fact]:
    """256 books, each of an author of its own."""
    books = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    authors = [f"{first} {last}" for first in FIRST for last in LAST]
    draw.shuffle(books)
    draw.shuffle(authors)
    return [(book, author, draw.choice(TOWNS)) for book, author in zip(books, authors, strict=True)]


def pages_of(fact: Fact) -> list[str]:
    book, author, town = fact
    return [f"author of {book} is {author}", f"birthplace of {author} is {town}"]


def make_search(corpus: Path, facts: list[Fact]) -> Callable[[str], str]:
    """Write the facts' pages to an index; the tool that searches it."""
    corpus.unlink(missing_ok=True)
    with sqlite3.connect(corpus) as index:
        try:
            index.execute("CREATE VIRTUAL TABLE pages USING fts5(text)")
        except sqlite3.OperationalError as error:
            raise SystemExit(
                f"This Python's SQLite can't search texts ({error}): take another."
            ) from error
        texts = [(page,) for fact in facts for page in pages_of(fact)]
        index.executemany("INSERT INTO pages VALUES (?)", texts)

    def search(query: str) -> str:
        """Finds the page that fits best.

        Args:
            query: Words that the page must have.
        """
        words = " ".join(f'"{word}"' for word in re.findall(r"\w+", query))
        best = "SELECT text FROM pages WHERE pages MATCH ? ORDER BY rank LIMIT 1"
        with sqlite3.connect(corpus) as index:  # one for each call: calls run side by side
            found = index.execute(best, [words]).fetchone() if words else None
        return found[0] if found else "nothing found"

    return search


def ask(fact: Fact) -> Row:
    return said("user", f"Where was the author of {fact[0]} born?")


def demonstrate(fact: Fact, *, thorough: bool) -> list[Row]:
    """Searches, and what the last one found as the answer."""
    messages = [ask(fact)]
    for page in pages_of(fact)[: 2 if thorough else 1]:
        query = page.partition(" is ")[0]
        messages += [call("search", query=query), said("tool", page)]
    return [*messages, said("assistant", messages[-1]["content"])]


def right(completion: str, ground_truth: str) -> float:
    """1 for the town, letter by letter."""
    return float(completion.rpartition(" is ")[2] == ground_truth)


def make_world(out: Path, seed: int) -> World:
    draw = random.Random(seed)
    facts = make_facts(draw)
    search = make_search(out / "corpus.db", facts)
    # Of other libraries, whose facts are of no use in this one: there is nothing to learn by heart
    elsewhere = [fact for _ in range(19) for fact in make_facts(draw)]
    shown = [demonstrate(fact, thorough=draw.random() < 0.5) for fact in elsewhere]
    rows = [
        {"prompt": [ask(fact)], "reward_model": {"ground_truth": fact[2]}, "data_source": "books"}
        for fact in facts
    ]
    return World(
        demonstrations=[{"messages": messages, "tools": [search]} for messages in shown],
        questions=rows[64:],
        held_out=rows[:64],
        reward=right,
        tools=[search],
        sft_steps=600,
    )


if __name__ == "__main__":
    main(make_world, __doc__)
