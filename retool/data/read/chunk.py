"""Rows as they are read: a chunk of consecutive raw rows of one file, and the error that names a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

CHUNK_ROWS = 256

RowFunction = Callable[[str], Iterable[Mapping[str, Any]]]


class RowError(ValueError):
    """A row that can't be used: names file, row and, where it is one, the turn."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive raw rows of one file, from row `start`; cheap to send to a worker process.

    `rows` is an Arrow batch (parquet), a list of text lines (JSON lines), or a list of mappings and
    of errors in the place of rows that can't be read (everything else).
    """

    file: str
    start: int
    rows: pa.RecordBatch | list[Any]

    def __len__(self) -> int:
        return len(self.rows) if isinstance(self.rows, list) else self.rows.num_rows

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        """(row index, row), or the reason why it isn't one.

        Blank JSON lines are passed over but counted as rows.
        """
        if not isinstance(self.rows, list):
            yield from _parquet_rows(self.file, self.start, self.rows)
            return
        for index, raw in enumerate(self.rows, self.start):
            if isinstance(raw, Mapping):
                yield index, dict(raw)
            elif isinstance(raw, RowError):
                yield index, raw
            elif not isinstance(raw, str):
                kind = type(raw).__name__
                where = f"{self.file}, row {index}"
                yield index, RowError(f"{where}: it is a {kind}, not a dict.")
            elif raw.strip():
                yield index, _parse_line(self.file, index, raw)

    def head(self, rows: int) -> Chunk:
        """The first `rows` rows."""
        kept = self.rows[:rows] if isinstance(self.rows, list) else self.rows.slice(0, rows)
        return Chunk(self.file, self.start, kept)


def _parse_line(file: str, index: int, line: str) -> dict[str, Any] | RowError:
    where = f"{file}, row {index}: line {index + 1}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return RowError(f"{where} isn't JSON ({error.msg} at column {error.colno}).")
    except ValueError as error:  # a number of more digits than Python reads
        return RowError(f"{where} can't be read: {error}.")
    except RecursionError:
        return RowError(f"{where} is nested too deeply to be read.")
    if not isinstance(row, dict):
        return RowError(
            f"{file}, row {index}: line {index + 1} is a JSON {type(row).__name__}, not an object."
        )
    return row


# --- Arrow ---


def _parquet_rows(
    file: str, start: int, batch: pa.RecordBatch
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """(row index, row) of a batch.

    Where it can't be converted as a whole, the rows that can't are told.
    """
    try:
        yield from enumerate(_rows_of(batch), start)
        return
    except (ValueError, pa.ArrowException, RecursionError):
        pass
    for i in range(batch.num_rows):
        try:
            yield start + i, _rows_of(batch.slice(i, 1))[0]
        except (ValueError, pa.ArrowException, RecursionError) as error:
            yield start + i, RowError(f"{file}, row {start + i}: it can't be read: {error}.")


def _rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows as Python's containers, columns of Arrow's JSON type decoded.

    `datasets` stores what has no single schema so, a call's arguments for one.
    """
    rows = batch.to_pylist()
    for column in batch.schema:
        if _holds_json(column.type):
            for row in rows:
                row[column.name] = _decoded(row[column.name], column.type)
    return rows


def _is_json(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _holds_json(kind: pa.DataType) -> bool:
    """Whether JSON text is somewhere in a type."""
    if _is_json(kind):
        return True
    return any(_holds_json(kind.field(i).type) for i in range(kind.num_fields))


def _decoded(value: Any, kind: pa.DataType) -> Any:
    """A value of such a type, its JSON texts read."""
    if value is None or not _holds_json(kind):
        return value
    if _is_json(kind):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {
            field.name: _decoded(value[field.name], field.type)
            for field in (kind.field(i) for i in range(kind.num_fields))
        }
    if isinstance(value, list) and not pa.types.is_map(kind):
        return [_decoded(entry, kind.field(0).type) for entry in value]
    return value
