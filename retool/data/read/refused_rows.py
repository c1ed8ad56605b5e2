"""Rows that can't be used. Faults of the same kind are counted together, so that a common one is
shown once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SHOWN_KINDS = 20
LONGEST_KIND = 160  # characters
PLACE = re.compile(r"^.*?, row \d+(, message \d+)?( \(\w+\))?(, tool call \d+)?: ", re.DOTALL)
# Not from an apostrophe, as in "isn't"
QUOTED = re.compile(r"(?<!\w)'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
NUMBER = re.compile(r"\d[\d,]*")


@dataclass
class RefusedRows:
    """How many rows were refused, and of each kind of reason the first one and the number."""

    count: int = 0
    kinds: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, why: str) -> None:
        """One more; `why` names its row."""
        kind = kind_of(why)
        first, count = self.kinds.get(kind, (why, 0))
        self.kinds[kind] = (first, count + 1)
        self.count += 1

    def error(self, rows: int) -> ValueError:
        """The error for all of them, of `rows` read: a line a kind, the commonest first."""
        lines = [f"{self.count:,} of {rows:,} rows can't be used:"]
        kinds = sorted(self.kinds.values(), key=lambda kind: -kind[1])
        for first, count in kinds[:SHOWN_KINDS]:
            more = f" … and {count - 1:,} more rows like it." if count > 1 else ""
            lines.append(first + more)
        rest = sum(count for _, count in kinds[SHOWN_KINDS:])
        if rest:
            lines.append(f"… and {rest:,} more rows.")
        return ValueError("\n".join(lines))


def kind_of(why: str) -> str:
    """A reason without its row, names and numbers, to count like ones together."""
    text = PLACE.sub("", why)
    text = QUOTED.sub("…", text)
    text = text.split("; ")[0]
    return NUMBER.sub("N", text)[:LONGEST_KIND]
