"""What a format is, and how a turn is read with one.

Nothing here raises on a model's text. A call that can't be understood comes back with a `problem`,
which goes to the model as the tool's answer.

[Note: reasoning] What stands between <think> and </think> is a draft: templates that know these
tags show what follows them as the answer, and servers look for calls only there. So does every
format, unless it says `in_thoughts`: ReTool's `<code>` is written in the middle of reasoning and run
there (arXiv 2504.11536, section 2.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal

from retool.rl.agent.reading.call import Call, Schemas, unreadable

MAX_CALLS_READ = 32  # of a turn: a model that repeats itself can write thousands
THOUGHT_OPENS = "<think>"
THOUGHT_CLOSES = "</think>"
THOUGHT = "thought"  # the group of a mark that is one
THOUGHTS = re.compile(r"\A(?:(?!<think>)(?s:.))*?</think>|<think>(?s:.*?)(?:</think>|\Z)")

# Of a turn: the template knows no reasoning · it may begin with <think> · the generation prompt
# already opened it.
Reasoning = Literal["none", "tagged", "opened"]

Mark = re.Match[str]  # of a format's `opens`
Found = tuple[Sequence[Call], int]  # calls, and where to look for the next
Read = Callable[[str, Mark, Schemas], Found]


@dataclass(frozen=True)
class Inline:
    """How a call is answered in the middle of the turn that makes it: behind `stop`, between two tags,
    and the model goes on in the same message.
    """

    stop: str
    opens: str
    closes: str

    def output(self, said: str, answers: Sequence[str]) -> str:
        """What is put behind a call with which the turn has `said` this: lines of its own."""
        begin = "" if said.endswith("\n") else "\n"
        shown = "\n".join(answers)
        end = "" if shown.endswith("\n") else "\n"
        return f"{begin}{self.opens}\n{shown}{end}{self.closes}\n"


@dataclass(frozen=True)
class Format:
    """How a model writes calls.

    `opens` is a regular expression for where calls may begin, in which ^ is the beginning of a line
    and groups have names; `read` reads those that begin there.

    `ends`: tokens that end a turn of calls, besides the chat template's. `signs`: texts in a
    template, or tokens, by which it is known where the template shows no call. `in_thoughts`: see
    [Note: reasoning]. `inline`: calls are answered amid the turn; None: when it has ended.
    """

    opens: str
    read: Read
    ends: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    in_thoughts: bool = False
    inline: Inline | None = None


def read_calls(
    form: Format,
    text: str,
    schemas: Schemas = (),
    reasoning: Reasoning = "none",
    most: int = MAX_CALLS_READ,
) -> list[Call]:
    """The calls of a turn that was written in `form`.

    At most `most` are read. One more stands for all that follow, with a `problem` that says so.
    """
    calls = list(islice(_all_calls(form, text, schemas, reasoning), most + 1))
    if len(calls) > most:
        limit = f"a turn has at most {most} calls"
        calls[most] = unreadable(limit, "this one and those after it weren't read")
    return calls


def before_calls(
    form: Format,
    text: str,
    reasoning: Reasoning = "none",
) -> str:
    """What a turn says and thinks before its first call."""
    mark = _next_mark(form, text, _answer_begins(form, text, reasoning), reasoning)
    return text if mark is None else text[: mark.start()]


def without_thoughts(text: str) -> str:
    """A turn without what stands between its <think> tags, or before a closing one."""
    return THOUGHTS.sub("", text)


def _all_calls(
    form: Format,
    text: str,
    schemas: Schemas,
    reasoning: Reasoning,
) -> Iterator[Call]:
    position = _answer_begins(form, text, reasoning)
    while mark := _next_mark(form, text, position, reasoning):
        calls, position = form.read(text, mark, schemas)
        yield from calls
        # Onwards, whatever a format's `read` says: one that stays where it is would loop for ever.
        position = max(position, mark.end(), mark.start() + 1)


def _answer_begins(
    form: Format,
    text: str,
    reasoning: Reasoning,
) -> int:
    """Where what the prompt had the model think is over."""
    opened = reasoning == "opened" and not form.in_thoughts
    return after(text, THOUGHT_CLOSES, 0) if opened else 0


def _next_mark(
    form: Format,
    text: str,
    position: int,
    reasoning: Reasoning,
) -> Mark | None:
    """The first mark from `position` on that isn't a thought's."""
    thinks = reasoning != "none" and not form.in_thoughts
    marks = _marks(form.opens, thinks)
    while mark := marks.search(text, position):
        if not thinks or mark.group(THOUGHT) is None:
            return mark
        position = after(text, THOUGHT_CLOSES, mark.end())
    return None


@cache
def _marks(
    opens: str,
    thinks: bool,
) -> re.Pattern[str]:
    thought = f"(?P<{THOUGHT}>{THOUGHT_OPENS})|" if thinks else ""
    return re.compile(f"{thought}(?:{opens})", re.MULTILINE)


def after(
    text: str,
    tag: str,
    start: int,
) -> int:
    """Where the next `tag` ends, or the text, if it has none."""
    place = text.find(tag, start)
    return len(text) if place < 0 else place + len(tag)
