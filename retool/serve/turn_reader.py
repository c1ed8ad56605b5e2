"""A turn's text → what was thought, what was said, and which tools are called."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retool.rl.agent.reading.call import Call, with_ids
from retool.rl.agent.reading.form import (
    THOUGHT_CLOSES,
    THOUGHT_OPENS,
    Format,
    Reasoning,
    before_calls,
    read_calls,
)

# What calls begin with in every format, and how long what tells one may become
MARK_BEGINS = re.compile(r"[<\[{`]")
MARK_CHARACTERS = 160


@dataclass(frozen=True)
class Turn:
    """What a turn says. `reasoning` None: thoughts aren't told apart."""

    reasoning: str | None
    content: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class TurnReader:
    """How the turns of a conversation are read.

    `form` is how calls are written, None where the model has no tools; `reasoning` what the template
    says of thoughts, `splits` whether they are told apart. `hidden` texts aren't shown: special
    tokens, which a call may be written with.
    """

    form: Format | None
    schemas: Sequence[Mapping[str, Any]]
    reasoning: Reasoning
    splits: bool
    hidden: Sequence[str] = field(default=())

    def whole(self, text: str) -> Turn:
        """A turn that is done. One with a call that can't be read stays the text that it is."""
        if self.form is None:
            return self._split(text)
        calls = read_calls(self.form, text, self.schemas, self.reasoning)
        unreadable = any(call.problem or not isinstance(call.arguments, dict) for call in calls)
        if not calls or unreadable:
            return self._split(text)
        before = before_calls(self.form, text, self.reasoning)
        return replace(self._split(before.rstrip()), calls=tuple(with_ids(calls, text)))

    def safe(self, text: str) -> Turn:
        """What a turn that grows has said for sure; calls come when it is whole."""
        if self.form is None:
            return self._split(text, grows=True)
        # What has been sent can't be taken back: everything that may become a call is held until it
        # is one, or isn't.
        before = before_calls(self.form, text, self.reasoning)
        if len(before) == len(text):
            begin = MARK_BEGINS.search(text, max(0, len(text) - MARK_CHARACTERS))
            before = text[: begin.start() if begin else len(text)]
        return self._split(before.rstrip(), grows=True)

    def _split(self, text: str, grows: bool = False) -> Turn:
        for hidden in self.hidden:
            text = text.replace(hidden, "")
        if not self.splits:
            return Turn(None, text)
        begin = text.lstrip()
        tagged = begin.startswith(THOUGHT_OPENS)
        if grows and not tagged and THOUGHT_OPENS.startswith(begin):
            return Turn("", "")  # it may become the tag
        if not tagged and self.reasoning != "opened":
            return Turn("", text)
        thought, closed, said = begin.removeprefix(THOUGHT_OPENS).partition(THOUGHT_CLOSES)
        # The last characters may be the beginning of the closing tag.
        if grows and not closed:
            thought = thought[: max(0, len(thought) - len(THOUGHT_CLOSES))]
        return Turn(thought.lstrip("\n"), said.lstrip("\n"))


def as_tool_calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Calls as OpenAI's messages have them."""
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False),
            },
        }
        for call in calls
    ]
