"""A game with a simulated user: a shop's customer, who leaves when asked more than is needed.

Half of the demonstrations ask for everything, as a form does, also for what the customer has said.
No demonstration says what that costs; the environment does.

    python -m examples.worlds.customer
"""

from __future__ import annotations

import random

from examples.worlds.learning import Row, World, main, talk
from examples.worlds.words import GOODS, PARTS


class Customer:
    """Wants one thing, tells a part of it, and answers as many questions as parts are missing."""

    def reset(self, row: Row) -> str:
        draw = random.Random(row["seed"])  # the same customer for all answers to a question
        good = draw.choice(GOODS)
        self.parts = {kind: f"The {kind} is {draw.choice(PARTS[kind])} ." for kind in PARTS}
        self.told = draw.sample(list(PARTS), draw.randint(0, 2))
        self.patience = len(PARTS) - len(self.told)
        self.wish = " ".join([f"A {good} .", *self.parts.values()])
        return " ".join([f"A {good} .", *(self.parts[kind] for kind in self.told)])

    def step(self, message: Row) -> tuple[str, float, bool]:
        """The answer to a question; or the end, where 1 is for the right thing."""
        asked = message["content"].removeprefix("Which ").removesuffix(" ?")
        self.patience -= 1
        if asked in self.parts and self.patience >= 0:
            return self.parts[asked], 0.0, False
        return "Bye .", float(message["content"] == self.wish), True


def demonstrate(seed: float, *, careful: bool) -> list[Row]:
    """A seller that asks for what isn't told, or for everything."""
    customer = Customer()
    said = [customer.reset({"seed": seed})]
    questions = [kind for kind in PARTS if not careful or kind not in customer.told]
    random.Random(seed).shuffle(questions)
    for kind in questions:
        said += [f"Which {kind} ?", customer.parts[kind]]
    return talk(*said, customer.wish)


def make_world(draw: random.Random) -> World:
    shown = [demonstrate(draw.random(), careful=draw.random() < 0.5) for _ in range(3200)]
    rows = [{"prompt": "A customer comes in."}] * 256
    return World(shown, rows[64:], rows[:64], environment=Customer)


if __name__ == "__main__":
    main(make_world, __doc__)
