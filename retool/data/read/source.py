"""Which rows are read: files, and the columns that make a conversation, or a function of the
user's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from retool.data.read.chunk import Chunk, RowFunction
from retool.data.read.files import columns_of, file_identity, iter_chunks
from retool.data.read.library import Part
from retool.data.read.names import resolve_files
from retool.data.read.row_format import RowFormat
from retool.data.read.user_function import load_function

MOST_COLUMNS = 8  # that are named


@dataclass(frozen=True)
class RowSource:
    """The rows of a data set: `files` (paths, folders, globs, URLs), and how they are read.

    `function_file` and `function_name` name a function of the user's, (path) -> rows, that reads
    the files in our stead. `max_rows` keeps the first rows over all files; -1: all. `part`: the
    split and configuration, of a data set with several.
    """

    files: str | Sequence[str]
    form: RowFormat = field(default_factory=RowFormat)
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

    @cached_property
    def forms(self) -> dict[str, RowFormat]:
        """The form of each file; nothing where a function reads them: its rows tell.

        Raises ValueError where a file lacks a column, or could be of several forms.
        """
        return {path: self.form.check(path, columns) for path, columns in self._columns.items()}

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        if self.function is not None:
            return {}
        return {path: columns_of(path) for path in self.paths}

    def check_columns(self) -> None:
        """Raises ValueError where a file lacks a column, or could be of several forms."""
        _ = self.forms

    def words(self) -> list[str]:
        """What was taken for what, which columns count besides, and which aren't read: a line a form, with
        the files that have it.
        """
        files: dict[str, list[str]] = {}
        for path, form in self.forms.items():
            columns = self._columns[path]
            words = form.layout.words
            said = {*form.layout.needed, *words.split()}
            besides = [name for name in columns if name in form.columns and name not in said]
            unread = [name for name in columns if name not in form.columns]
            words += f"; with {_few(besides)}" if besides else ""
            words += f"; not read: {_few(unread)}" if unread else ""
            files.setdefault(words, []).append(path.rpartition("/")[2])
        return [f"{named(paths)}: {words}" for words, paths in files.items()]

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


def _few(columns: Sequence[str]) -> str:
    more = len(columns) - MOST_COLUMNS
    return ", ".join(columns[:MOST_COLUMNS]) + (f" and {more:,} more" if more > 0 else "")


def named(files: Sequence[str]) -> str:
    """A few files by name, many by the first and their number."""
    if len(files) <= 3:
        return ", ".join(files)
    return f"{files[0]} and {len(files) - 1:,} more files"
