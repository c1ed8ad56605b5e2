"""Which columns make a conversation: the forms that rows come in, and how one is recognised.

A form is recognised by its columns alone, never by what the rows say; where the columns are those of
two forms, the user says which (`data.format`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache

# How OpenAI's format named the tools before `tools`, with bare functions in it.
LEGACY_TOOLS = "functions"
AUTO = "auto"
FORMATS = (AUTO, "messages", "sharegpt", "alpaca", "prompt_completion", "prompt_response")


@dataclass(frozen=True)
class Layout:
    """The columns of a form: those it needs, those it may have; and what becomes of them, in words."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    words: str


@dataclass(frozen=True)
class RowFormat:
    """Which columns make a conversation.

    `format` is one of FORMATS. `multiturn` false means prompt_response, whatever it says.
    """

    multiturn: bool = True
    messages_key: str = "messages"
    tools_key: str = "tools"
    enable_thinking_key: str = "enable_thinking"
    prompt_key: str = "prompt"
    response_key: str = "response"
    format: str = AUTO

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"data.format={self.format} is unknown: use {', '.join(FORMATS)}.")

    @property
    def named(self) -> str:
        """The form, where a setting says it; else `auto`."""
        if not self.multiturn:
            return "prompt_response"
        # Who names the column of the messages means the form that has one
        if self.format == AUTO and self.messages_key != "messages":
            return "messages"
        return self.format

    @property
    def layout(self) -> Layout:
        """The columns of a form that was recognised, or named."""
        return self.layouts()[self.named]

    def layouts(self) -> dict[str, Layout]:
        """Each form's columns, with the names that the settings give them."""
        conversations = "conversations" if self.messages_key == "messages" else self.messages_key
        return {
            "messages": Layout((self.messages_key,), ("system",), "messages"),
            "sharegpt": Layout(
                (conversations,),
                ("system",),
                "ShareGPT; human → user, gpt → assistant, function_call → tool call, observation → tool",
            ),
            "alpaca": Layout(
                ("instruction", "output"),
                ("input", "system", "history"),
                "Alpaca; instruction + input → user, output → assistant",
            ),
            "prompt_completion": Layout(
                (self.prompt_key, "completion"),
                ("system",),
                f"prompt and completion; {self.prompt_key} → user (or its messages), completion → assistant",
            ),
            "prompt_response": Layout(
                (self.prompt_key, self.response_key),
                ("system",),
                f"prompt and response; {self.prompt_key} → user (or its messages), "
                f"{self.response_key} → assistant",
            ),
        }

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read; where the form isn't settled, those of every form."""
        known = self.layouts()
        chosen = known.values() if self.named == AUTO else [known[self.named]]
        of_forms = (name for layout in chosen for name in (*layout.needed, *layout.optional))
        legacy = (LEGACY_TOOLS,) if self.tools_key == "tools" else ()
        return tuple(dict.fromkeys((*of_forms, self.tools_key, self.enable_thinking_key, *legacy)))

    def settled(self, columns: Collection[str], where: str) -> RowFormat:
        """With the form of rows that have these columns; `where` they are, for messages.

        Raises ValueError where it is none, or several, or a column is missing.
        """
        return _settled(self, tuple(columns), where)

    def check(self, where: str, columns: Collection[str]) -> RowFormat:
        """`settled`, and every column there that was named on purpose."""
        form = self.settled(columns, where)
        on_purpose = {
            "data.multiturn.tools_key": (self.tools_key, "tools"),
            "data.multiturn.enable_thinking_key": (self.enable_thinking_key, "enable_thinking"),
        }
        for key, (column, usual) in on_purpose.items():
            if column not in (usual, *columns):
                raise ValueError(
                    _missing(where, column, columns, f"Name the right one with {key}.")
                )
        return form


def _settled(form: RowFormat, columns: tuple[str, ...], where: str) -> RowFormat:
    name = form.named if form.named != AUTO else _recognised(form, columns)
    if name not in FORMATS:
        raise ValueError(f"{where} {name}")
    for column in form.layouts()[name].needed:
        if column not in columns:
            raise ValueError(_missing(where, column, columns, _way_out(form, name, column)))
    return replace(form, multiturn=True, format=name)


# Rows by the million have the same few sets of columns
@lru_cache(maxsize=64)
def _recognised(form: RowFormat, columns: tuple[str, ...]) -> str:
    """The one form whose columns are there; or what is wrong, to be said behind the place."""
    known = form.layouts()
    fitting = [name for name, layout in known.items() if {*layout.needed} <= {*columns}]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        forms = ", ".join(f"{name} ({', '.join(known[name].needed)})" for name in fitting)
        return f"has the columns of several forms: {forms}. Say which: data.format={fitting[0]}."
    others = [
        f"{name} ({', '.join(layout.needed)})"
        for name, layout in known.items()
        if name != "messages"
    ]
    return (
        f"has no column {form.messages_key!r}; it has {', '.join(columns) or 'nothing'}. Name the right one "
        f"with data.multiturn.messages_key. Other forms are known by their columns: {'; '.join(others)}."
    )


def _missing(where: str, column: str, columns: Collection[str], way_out: str) -> str:
    return f"{where} has no column {column!r}; it has {', '.join(columns) or 'nothing'}. {way_out}"


def _way_out(form: RowFormat, name: str, column: str) -> str:
    keys = {
        form.prompt_key: "data.prompt_key",
        form.response_key: "data.response_key",
        form.messages_key: "data.multiturn.messages_key",
    }
    if column in keys:
        return f"Name the right one with {keys[column]}."
    return f"data.format={name} needs it: choose another, or rename a column."
