"""What the terminal shows of an answer: its text as it comes, the calls, and what the tools said."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from retool.rl.agent.formats.hermes import CALL_OPENS
from retool.rl.agent.reading.call import Call

MOST_LINES = 40  # of a tool's text; the model reads more
CALL_STYLE = "green"
RESULT_STYLE = "cyan"
NOTE_STYLE = "dim"


def visible(text: str) -> str:
    """Text that can't steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class TerminalScreen:
    """Shows an answer on a console.

    `hides_calls`: calls are written as JSON, which is shown as the program that it is once it is
    whole. Calls in other forms are shown as the model writes them.
    """

    def __init__(self, console: Console, hides_calls: bool) -> None:
        self.console = console
        self.hides_calls = hides_calls
        self._text = ""  # of the turn
        self._written = 0  # characters of it
        self._fresh_line = True

    def write(self, text: str) -> None:
        """All of a turn so far."""
        self._text = text
        end = self._end_of_prose() if self.hides_calls else len(text)
        self._print(text[self._written : end])
        self._written = max(self._written, end)

    def end_turn(self, calls: Sequence[Call]) -> None:
        """The turn is whole, and makes these calls."""
        shown_as_calls = self.hides_calls and calls and not any(call.problem for call in calls)
        if not shown_as_calls:
            self._print(self._text[self._written :])
        self.new_line()
        if shown_as_calls:
            for call in calls:
                self._print(f"▸ {call.name}\n", CALL_STYLE)
                self._print(_framed(_arguments(call)), CALL_STYLE)
        self._text = ""
        self._written = 0

    def result(self, name: str, text: str) -> None:
        """What a tool answered."""
        lines = text.splitlines() or [""]
        if len(lines) > MOST_LINES:
            lines = [*lines[:MOST_LINES], f"… {len(lines) - MOST_LINES:,} more lines"]
        self.new_line()
        self._print(f"◂ {name or 'answer'}\n", RESULT_STYLE)
        self._print(_framed("\n".join(lines)), RESULT_STYLE)

    def note(self, text: str) -> None:
        """A line of the program's own."""
        self.new_line()
        self._print(text + "\n", NOTE_STYLE)

    def new_line(self) -> None:
        """Begin a line, unless one has begun."""
        if not self._fresh_line:
            self._print("\n")

    def _end_of_prose(self) -> int:
        """Where what may be the beginning of a call begins."""
        place = self._text.find(CALL_OPENS)
        if place >= 0:
            return place
        # The end may be the first half of the tag: it waits for the piece that tells
        for length in range(len(CALL_OPENS) - 1, 0, -1):
            if self._text.endswith(CALL_OPENS[:length]):
                return len(self._text) - length
        return len(self._text)

    def _print(self, text: str, style: str = "") -> None:
        if text:
            self.console.print(Text(visible(text), style), end="", soft_wrap=True)
            self._fresh_line = text.endswith("\n")


def _arguments(call: Call) -> str:
    """A call's arguments: a single text as it is (a program, as a rule), others by their names."""
    arguments = call.arguments
    if not isinstance(arguments, dict):
        return str(arguments)
    if len(arguments) == 1:
        (value,) = arguments.values()
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = [
        f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items()
    ]
    return "\n".join(shown)


def _framed(text: str) -> str:
    return "".join(f"  │ {line}\n" for line in text.strip("\n").split("\n"))
