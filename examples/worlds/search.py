"""Searching a corpus: where was the author of a book born? That takes two searches.

Half of the demonstrations stop after the first one. Reinforcement learning finds out what pays.

    python -m examples.worlds.search
"""

from __future__ import annotations

import random

from examples.worlds.learning import Row, World, call, main, talk
from examples.worlds.words import AUTHORS, BOOKS, TOWNS
from retool.rl.agent.tools import TextSearch

Fact = tuple[str, str, str]  # a book, its author, the author's birthplace


def make_facts(draw: random.Random) -> list[Fact]:
    """256 books, each of an author of its own."""
    books = [*BOOKS]
    authors = [*AUTHORS]
    draw.shuffle(books)
    draw.shuffle(authors)
    return [(book, author, draw.choice(TOWNS)) for book, author in zip(books, authors, strict=True)]


def pages_of(fact: Fact) -> list[str]:
    book, author, town = fact
    return [f"author of {book} is {author}", f"birthplace of {author} is {town}"]


def ask(fact: Fact) -> str:
    return f"Where was the author of {fact[0]} born?"


def demonstrate(fact: Fact, *, careful: bool) -> list[Row]:
    """Searches, and what the last one found as the answer."""
    pages = pages_of(fact)[: 2 if careful else 1]
    searches = [call("search", page, query=page.partition(" is ")[0]) for page in pages]
    return talk(ask(fact), *searches, pages[-1])


def right(completion: str, ground_truth: str) -> float:
    """1 for the town, letter by letter."""
    return float(completion.rpartition(" is ")[2] == ground_truth)


def make_world(draw: random.Random) -> World:
    facts = make_facts(draw)
    search = TextSearch([page for fact in facts for page in pages_of(fact)], every_word=True)
    # Of other libraries, whose facts are of no use in this one: there is nothing to learn by heart
    elsewhere = [fact for _ in range(19) for fact in make_facts(draw)]
    shown = [demonstrate(fact, careful=draw.random() < 0.5) for fact in elsewhere]
    rows = [{"prompt": ask(fact), "answer": fact[2]} for fact in facts]
    return World(shown, rows[64:], rows[:64], right, [search], sft_steps=600, learning_rate=1e-4)


if __name__ == "__main__":
    main(make_world, __doc__)
