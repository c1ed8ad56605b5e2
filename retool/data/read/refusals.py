"""Rows that can't be used: counted, like ones together, so that a fault that every row has is read
once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KINDS = 20  # shown


@dataclass
class Refusals:
    """How many rows were refused; the first of each kind of reason, and how many there are of it."""

    count: int = 0
    kinds: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, why: str) -> None:
        """One more; `why` names its row."""
        first, count = self.kinds.get(kind := kind_of(why), (why, 0))
        self.kinds[kind] = first, count + 1
        self.count += 1

    def error(self, rows: int) -> ValueError:
        """All of them, of `rows` read: a first line, then a line a kind, the commonest first."""
        kinds = sorted(self.kinds.values(), key=lambda entry: -entry[1])
        lines = [
            first + (f" … and {count - 1:,} more rows like it." if count > 1 else "")
            for first, count in kinds[:KINDS]
        ]
        if rest := sum(count for _, count in kinds[KINDS:]):
            lines.append(f"… and {rest:,} more rows.")
        return ValueError("\n".join([f"{self.count:,} of {rows:,} rows can't be used:", *lines]))


def kind_of(why: str) -> str:
    """A reason without its row, names and numbers, to count like ones together."""
    text = re.sub(
        r"^.*?, row \d+(, message \d+)?( \(\w+\))?(, tool call \d+)?: ", "", why, flags=re.DOTALL
    )
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "…", text)
    return re.sub(r"\d[\d,]*", "N", text.split("; ")[0])[:160]
