"""What the doctor finds, and the table of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NAME_WIDTH = 24
TEXT_WIDTH = 84


@dataclass(frozen=True)
class Finding:
    """One line of the table; `problem` is what is wrong, with the way out, or nothing."""

    subject: str
    found: str
    problem: str = ""


def table(findings: Sequence[Finding]) -> str:
    """All findings, what is wrong among them below its line, and a sentence to close with."""
    lines = list[str]()
    for finding in findings:
        mark = "✗" if finding.problem else "✓"
        lines += _cell(f"{mark} {finding.subject}", finding.found)
        if finding.problem:
            lines += _cell("", finding.problem)
    wrong = sum(bool(finding.problem) for finding in findings)
    last = f"{wrong} thing(s) to mend: see ✗." if wrong else "nothing is wrong."
    return "\n".join([*lines, "", last])


def _cell(name: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, TEXT_WIDTH) or [""]
    names = [name, *[""] * (len(wrapped) - 1)]
    return [f"{left:{NAME_WIDTH}} {right}" for left, right in zip(names, wrapped, strict=True)]


def alike(subject: str, said: Mapping[str, Sequence[str]], way_out: str) -> Finding:
    """Whether all ranks say the same; `said` has the names of those that say each thing."""
    if len(said) == 1:
        return Finding(subject, next(iter(said)))
    parts = [f"{value or 'nothing'} ({', '.join(names)})" for value, names in said.items()]
    return Finding(subject, "; ".join(parts), f"Not the same everywhere. {way_out}")
