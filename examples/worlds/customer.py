"""A game with a simulated user: a shop's customer, who leaves when asked more than is needed.

Half of the demonstrations ask for everything, as a form does, also for what the customer has said.
No demonstration says what that costs; the environment does.

    python -m examples.worlds.customer
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.worlds.learning import Row, World, main, said

GOODS = "bag bowl chair clock coat hat lamp rug scarf vase".split()
WORDS = {
    "colour": "black blue brown green grey pink red white".split(),
    "size": "huge large long narrow short small tall wide".split(),
    "material": "cotton glass iron leather linen paper silk wool".split(),
}


class Customer:
    """Wants one thing, tells a part of it, and answers as many questions as parts are missing."""

    def reset(self, row: Mapping[str, Any]) -> list[Row]:
        draw = random.Random(row["seed"])  # the same customer for all answers to a question
        self.good = draw.choice(GOODS)
        self.wish = {kind: draw.choice(words) for kind, words in WORDS.items()}
        self.told = draw.sample(list(WORDS), draw.randint(0, 2))
        self.patience = len(WORDS) - len(self.told)
        return [said("user", " ".join([f"A {self.good} .", *map(self.tell, self.told)]))]

    def tell(self, kind: str) -> str:
        return f"The {kind} is {self.wish[kind]} ."

    def whole_wish(self) -> str:
        return " ".join([f"A {self.good} .", *map(self.tell, WORDS)])

    def step(self, message: Mapping[str, Any]) -> tuple[str, float, bool]:
        """The answer to a question; or the end, where 1 is for the right thing."""
        asked = message["content"].removeprefix("Which ").removesuffix(" ?")
        self.patience -= 1
        if asked in WORDS and self.patience >= 0:
            return self.tell(asked), 0.0, False
        return "Bye .", float(message["content"] == self.whole_wish()), True


def demonstrate(seed: float, *, attentive: bool) -> list[Row]:
    """A seller that asks for what isn't told, or for everything."""
    customer = Customer()
    messages = customer.reset({"seed": seed})
    questions = [kind for kind in WORDS if not attentive or kind not in customer.told]
    random.Random(seed).shuffle(questions)
    for kind in questions:
        messages += [said("assistant", f"Which {kind} ?"), said("user", customer.tell(kind))]
    return [*messages, said("assistant", customer.whole_wish())]


def make_world(out: Path, seed: int) -> World:
    del out  # nothing is written
    draw = random.Random(seed)
    shown = [demonstrate(draw.random(), attentive=draw.random() < 0.5) for _ in range(3200)]
    rows = [{"prompt": "A customer comes in.", "data_source": "shop"}] * 256
    return World(
        demonstrations=[{"messages": messages} for messages in shown],
        questions=rows[64:],
        held_out=rows[:64],
        environment=Customer,
    )


if __name__ == "__main__":
    main(make_world, __doc__)
