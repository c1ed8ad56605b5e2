"""Environments that the tests' runs are given, as a user's file would hold them."""

from __future__ import annotations

import random
import time
from pathlib import Path


class Digits:
    """Asks for digits, three times at most; each turn is given its share of them.

    What it asks is drawn from the row's seed. `log` gets a line of every call. Sample 1 of each
    question breaks in `broken`, and sample 2 hangs there where `hangs`.
    """

    def __init__(self, log: str = "", broken: str = "", hangs: bool = False) -> None:
        self.log = log
        self.broken = broken
        self.hangs = hangs
        self.turns = 0

    def reset(self, row):
        self.me = f"{row['seed']}/{row['sample']}"
        self.sample = row["sample"]
        self.draws = random.Random(self.me)
        self._call("reset")
        return f"Write the digit {random.Random(row['seed']).randrange(10)}."

    def step(self, message):
        self._call("step")
        self.turns += 1
        text = message["content"]
        share = sum(letter.isdigit() for letter in text) / max(len(text), 1)
        return f"And {self.draws.randrange(10)}.", share, self.turns == 3

    def close(self):
        self._call("close")

    def _call(self, what):
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{what} {self.me}\n")
        if self.broken == what and self.sample == 1:
            raise OSError("the game server is away")
        if self.broken == what and self.sample == 2 and self.hangs:
            time.sleep(60)
