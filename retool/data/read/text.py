"""Text files into chunks: JSON lines, one JSON list, CSV. Nothing is held but the chunk at hand.

`datasets` reads these, too, and gives each column one type that it guesses from the first rows: a
CSV's "007" becomes 7, a call's arguments get every key of every other call. What is trained must be
what is there, so these are read here.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO, Any

from retool.data.read.chunk import CHUNK_ROWS, Chunk, RowError

BLOCK = 1 << 20  # characters of a list that are read at once
JSON = json.JSONDecoder()
BOM = b"\xef\xbb\xbf"
BETWEEN = re.compile(r"\s*,?\s*")


def line_chunks(file: str, stream: IO[bytes]) -> Iterator[Chunk]:
    """JSON lines, as text: who reads the chunk parses them."""
    start = 0
    while lines := list(islice(stream, CHUNK_ROWS)):
        if start == 0:
            lines[0] = lines[0].removeprefix(BOM)
        texts = [line.decode("utf-8", "surrogateescape") for line in lines]
        yield Chunk(file, start, texts)
        start += len(texts)


def json_chunks(file: str, stream: io.BufferedReader) -> Iterator[Chunk]:
    """A `.json` file: one list of objects, or an object a line."""
    if stream.peek(BLOCK).removeprefix(BOM).lstrip().startswith(b"["):
        yield from _grouped(file, _array_rows(file, stream))
    else:
        yield from line_chunks(file, stream)


def csv_chunks(file: str, stream: IO[bytes]) -> Iterator[Chunk]:
    """A CSV file with a header, every cell as text."""
    yield from _grouped(file, _csv_rows(file, stream))


def _grouped(file: str, rows: Iterable[Any]) -> Iterator[Chunk]:
    ahead = iter(rows)
    start = 0
    while part := list(islice(ahead, CHUNK_ROWS)):
        yield Chunk(file, start, part)
        start += len(part)


def _text_of(stream: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    # What isn't UTF-8 arrives as surrogates, and is refused with its row.
    return io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=newline)


def _array_rows(file: str, stream: IO[bytes]) -> Iterator[Any]:
    """The entries of one JSON list, parsed while the file is read."""
    source = _text_of(stream)
    text = source.read(BLOCK)
    at = text.index("[") + 1
    index = 0
    while True:
        at = _next_entry(text, at)
        if at < len(text) and text[at] == "]":
            break
        try:
            row, end = JSON.raw_decode(text, at)
        except json.JSONDecodeError as error:
            # It may only be cut off; reading as much again keeps long entries linear.
            more = source.read(max(BLOCK, len(text) - at))
            if not more:
                near = text[error.pos : error.pos + 30]
                raise ValueError(
                    f"{file}, row {index}: it isn't JSON ({error.msg}, at {near!r}), so neither is what "
                    "follows in the list. Mend the file."
                ) from error
            text = text[at:] + more
            at = 0
            continue
        except (ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ValueError(f"{file}, row {index}: it can't be read: {why}.") from error
        kind = type(row).__name__
        yield (
            row
            if isinstance(row, dict)
            else RowError(f"{file}, row {index}: it is a JSON {kind}, not an object.")
        )
        index += 1
        at = end
    behind = text[at + 1 :] + source.read(BLOCK)
    if behind.strip():
        raise ValueError(f"{file}: {behind.strip()[:30]!r} follows the list of rows. Take it out.")


def _next_entry(text: str, at: int) -> int:
    """Where the entry behind a comma and white space begins."""
    found = BETWEEN.match(text, at)
    return found.end() if found else at


def _csv_rows(file: str, stream: IO[bytes]) -> Iterator[dict[str, str] | RowError]:
    csv.field_size_limit(sys.maxsize)  # a conversation may be longer than the module's 131,072
    reader = csv.DictReader(_text_of(stream, newline=""), strict=True)
    index = 0
    try:
        names = reader.fieldnames or ()
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{file} has two columns {twice[0]!r}: rename one.")
        for row in reader:
            cells = len(names) + len(row.pop(None, ())) - sum(cell is None for cell in row.values())
            if cells == len(names):
                yield row
            else:
                where = f"{file}, row {index} (ends in line {reader.line_num})"
                yield RowError(f"{where}: it has {cells} cells, and the header {len(names)}.")
            index += 1
    except csv.Error as error:
        raise ValueError(
            f"{file}, row {index}: it isn't CSV ({error}, line {reader.line_num}). Quote cells that hold "
            "quotes or line breaks."
        ) from error
