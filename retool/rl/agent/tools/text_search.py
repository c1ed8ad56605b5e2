"""A tool that searches texts of your own: SQLite's full-text index (FTS5), in this process."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from retool.data.read.chunk import RowError
from retool.data.read.files import iter_chunks
from retool.data.read.library import IN_NAME
from retool.data.read.names import resolve_files
from retool.rl.agent.tools.on_thread import on_thread
from retool.rl.agent.tools.protocol import ToolResult, check_schema, function_of

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds the pages that fit a query best.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "Words to look for."}},
            "required": ["query"],
        },
    },
}
BEST = "SELECT text FROM pages WHERE pages MATCH ? ORDER BY rank LIMIT ?"  # by BM25
NOTHING = "nothing found"


class TextSearch:
    """A `Tool` that shows the `results` pages which fit a query best, ranked by BM25.

    The pages are those of `pages`, and those in the column `column` of `files`, of any kind that
    training reads. The index is in this process's memory, two to three times as large as the texts. A page
    fits where it has a word of the query; with `every_word`, where it has all of them. `schema`
    goes before `SCHEMA`, to describe what there is to be found.

    ValueError for pages that aren't text, where there is none, and for a Python whose SQLite can't
    search texts.
    """

    def __init__(
        self,
        pages: Iterable[str] = (),
        *,
        files: str | Sequence[str] = (),
        column: str = "text",
        results: int = 1,
        every_word: bool = False,
        schema: dict[str, Any] | None = None,
    ) -> None:
        self.schema = schema or SCHEMA
        self.name = str(function_of(self.schema)["name"])
        check_schema(self.name, self.schema)
        if results < 1:
            raise ValueError(f"results={results} must be at least 1.")
        self._results = results
        named = resolve_files(files, part=IN_NAME) if files else []
        self._between = " AND " if every_word else " OR "
        self._index = _index_of([*pages, *_in_files(named, column)])

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """The pages, with an empty line between two of them."""
        query = arguments.get("query")
        if not isinstance(query, str):
            text = f"ArgumentError: {self.name} needs the argument 'query', a string."
            return ToolResult(text, "bad_arguments")
        found = await on_thread(partial(self.find, query))
        return ToolResult("\n\n".join(found) or NOTHING, "success")

    def find(self, query: str) -> list[str]:
        """The pages that fit, the best first. Nothing in a query has a meaning but its words."""
        words = [f'"{word}"' for word in re.findall(r"\w+", query)]
        if not words:
            return []
        rows = self._index.execute(BEST, [self._between.join(words), self._results])
        return [text for (text,) in rows.fetchall()]

    async def close(self) -> None:
        """The index goes with the object: a program may use it in another run."""


def _index_of(pages: Sequence[str]) -> sqlite3.Connection:
    for page in pages:
        if not isinstance(page, str):
            raise ValueError(f"a page is a {type(page).__name__}, not text.")
    if not pages:
        raise ValueError("there is no page to search: give pages, or files.")
    # Calls come on threads of their own; SQLite lets them in one after the other
    index = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        index.execute("CREATE VIRTUAL TABLE pages USING fts5(text)")
    except sqlite3.OperationalError as error:
        raise ValueError(
            f"this Python's SQLite can't search texts ({error}): take another."
        ) from error
    index.executemany("INSERT INTO pages VALUES (?)", [(page,) for page in pages])
    return index


def _in_files(files: Sequence[str], column: str) -> Iterator[str]:
    """The texts of a column. ValueError, naming file and row, where one isn't there."""
    for chunk in iter_chunks(files, [column]):
        for index, row in chunk:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row.get(column), str):
                raise ValueError(
                    f"{chunk.file}, row {index}: there is no text in the column {column!r}. Name "
                    "another: column."
                )
            yield row[column]
