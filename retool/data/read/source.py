"""Which rows are read: files, the columns that make a conversation, or a function of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from retool.data.read.chunk import Chunk, RowFunction
from retool.data.read.files import columns_of, file_identity, iter_chunks
from retool.data.read.library import Part
from retool.data.read.names import resolve_files
from retool.data.read.user_function import load_function

# How OpenAI's format named the tools before `tools`, with bare functions in it.
LEGACY_TOOLS = "functions"


@dataclass(frozen=True)
class RowFormat:
    """Which columns make a conversation: a list of messages, or a prompt and its response.

    The latter if `multiturn` is false.
    """

    multiturn: bool = True
    messages_key: str = "messages"
    tools_key: str = "tools"
    enable_thinking_key: str = "enable_thinking"
    prompt_key: str = "prompt"
    response_key: str = "response"

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return (self.messages_key,) if self.multiturn else (self.prompt_key, self.response_key)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        legacy = (LEGACY_TOOLS,) if self.tools_key == "tools" else ()
        return (*self.required, self.tools_key, self.enable_thinking_key, *legacy)

    def check(self, file: str) -> None:
        """Raises ValueError when a column is missing.

        An optional one is only missed when it was named on purpose.
        """
        there = columns_of(file)
        wanted = list(self.required)
        if self.tools_key != "tools":
            wanted.append(self.tools_key)
        if self.enable_thinking_key != "enable_thinking":
            wanted.append(self.enable_thinking_key)
        for column in wanted:
            if column not in there:
                raise ValueError(
                    f"{file} has no column {column!r}; it has {', '.join(there)}. "
                    f"{self._way_out(column)}"
                )

    def _way_out(self, column: str) -> str:
        keys = {
            self.messages_key: "data.multiturn.messages_key",
            self.tools_key: "data.multiturn.tools_key",
            self.enable_thinking_key: "data.multiturn.enable_thinking_key",
            self.prompt_key: "data.prompt_key",
            self.response_key: "data.response_key",
        }
        return f"Name the right one with {keys[column]}."


@dataclass(frozen=True)
class RowSource:
    """The rows of a data set: `files` (paths, folders, globs, URLs), and how they are read.

    `function_file` and `function_name` name a function of the user's, (path) -> rows, that reads
    the files in our stead. `max_rows` keeps the first rows over all files; -1: all. `part`: the
    split and configuration, of a data set with several.
    """

    files: str | Sequence[str]
    form: RowFormat = RowFormat()
    function_file: str | None = None
    function_name: str | None = None
    max_rows: int = -1
    part: Part | None = None

    @cached_property
    def function(self) -> RowFunction | None:
        """The user's function. Raises ValueError where it can't be loaded."""
        if self.function_file is None:
            return None
        return load_function(self.function_file, self.function_name or "")

    @cached_property
    def paths(self) -> list[str]:
        """Every file, in order. Raises ValueError for one that is missing or of a strange kind."""
        return resolve_files(self.files, self.function is not None, self.part)

    def check_columns(self) -> None:
        """Raises ValueError where a file lacks a column; what a function gives, its rows tell."""
        if self.function is None:
            for path in self.paths:
                self.form.check(path)

    def chunks(self) -> Iterator[Chunk]:
        """All rows, a chunk at a time."""
        return iter_chunks(self.paths, self.form.columns, self.function, self.max_rows)

    def identity(self) -> list[str]:
        """Texts that change whenever the rows could; what the user's function imports isn't seen."""
        function = ""
        if self.function_file is not None:
            code = Path(self.function_file).read_text(encoding="utf-8")
            function = f"{code}:{self.function_name}"
        return [*map(file_identity, self.paths), repr((self.form, self.max_rows)), function]
