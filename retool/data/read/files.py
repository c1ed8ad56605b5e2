"""Sources of rows, whatever they are, as chunks of raw rows.

Everything streams: at most one chunk of rows is in memory at a time, whatever the size of the file.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from retool.data.read.chunk import CHUNK_ROWS, Chunk, RowFunction
from retool.data.read.library import (
    is_hub_name,
    is_saved,
    open_table,
    table_chunks,
    table_columns,
    table_files,
)
from retool.data.read.names import kind_of_file
from retool.data.read.text import csv_chunks, json_chunks, line_chunks
from retool.data.read.user_function import function_chunks
from retool.files.afar import answer, is_remote, items

KINDS_OF_TEXT = (
    "A .jsonl has an object a line; a .json may also be one list of objects; what is compressed ends "
    "in .gz or .zst."
)


def is_table(source: str) -> bool:
    """Whether `datasets` reads it: a data set of the hub, or a folder that it saved."""
    if kind_of_file(source)[0]:
        return False
    return is_saved(source) or (is_hub_name(source) and not os.path.exists(source))


def file_identity(file: str) -> str:
    """Changes when the file changes.

    It is made of path, size and modification time, or of what the remote store says of it.
    """
    if is_table(file):
        return "\0".join([file, *map(file_identity, table_files(file))])
    fs, path = url_to_fs(file)
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "file" in protocols:
        stat = os.stat(path)
        # Not the content: hashing it would take as long as reading all of the data.
        return f"{os.path.realpath(path)}:{stat.st_size}:{stat.st_mtime_ns}"
    return f"{file}:{answer(file, lambda: fs.ukey(path))}"


def columns_of(file: str) -> list[str]:
    """The columns of a table, or the fields of the first rows of a text file.

    Raises ValueError when empty.
    """
    return answer(file, lambda: _columns_of(file))


def _columns_of(file: str) -> list[str]:
    if is_table(file):
        return table_columns(file)
    if kind_of_file(file)[0] == ".parquet":
        with opened_parquet(file) as parquet:
            return list(parquet.schema_arrow.names)
    for chunk in _file_chunks(file, None, None):
        found = [row for _, row in chunk]
        rows = [row for row in found if isinstance(row, dict)]
        if found and not rows:
            raise ValueError(f"{found[0]} {KINDS_OF_TEXT}")
        if rows:
            return list(dict.fromkeys(name for row in rows for name in row))
    raise ValueError(f"{file} has no rows.")


def rows_in(file: str) -> int | None:
    """How many rows a table says that it has; None where only reading would tell."""
    if is_table(file):
        return len(open_table(file))
    return answer(file, lambda: _rows_in_parquet(file))


def _rows_in_parquet(file: str) -> int | None:
    if kind_of_file(file)[0] != ".parquet":
        return None
    with opened_parquet(file) as parquet:
        return parquet.metadata.num_rows


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed. Raises ValueError where there are none."""
    fs, path = url_to_fs(file)
    if fs.size(path) == 0:
        raise ValueError(f"{file} is empty (0 bytes).")
    compression = kind_of_file(file)[1]
    with fs.open(path, "rb") as stream:
        if compression is None:
            yield stream
        else:
            with pa.CompressedInputStream(stream, compression) as plain:
                yield io.BufferedReader(plain)  # pyright: ignore[reportArgumentType]


@contextmanager
def opened_parquet(file: str) -> Iterator[pq.ParquetFile]:
    """A parquet file. Raises ValueError where it isn't one, or has no rows."""
    with _opened(file) as stream, tempfile.TemporaryFile() as unpacked:
        if kind_of_file(file)[1] is not None:  # it is read from its end
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        try:
            parquet = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} isn't a readable parquet file: {error}") from error
        if parquet.metadata.num_rows == 0:
            raise ValueError(f"{file} has no rows.")
        yield parquet


def iter_chunks(
    files: Sequence[str],
    columns: Sequence[str] | None = None,
    rows_function: RowFunction | None = None,
    limit: int = -1,
) -> Iterator[Chunk]:
    """Every row of `files` in order, as chunks.

    Of a parquet file or a data set only `columns` (those it has) are read.

    `limit` keeps the first rows over all files (-1: all). Raises ValueError for a file that is
    empty or unreadable.
    """
    left = limit if limit >= 0 else None
    for file in files:
        if left == 0:
            return
        seen = 0
        make = partial(_file_chunks, file, columns, rows_function)
        for chunk in items(file, make) if rows_function is None else make():
            part = chunk if left is None or len(chunk) <= left else chunk.head(left)
            left = None if left is None else left - len(part)
            seen += len(part)
            if len(part):
                yield part
            if left == 0:
                return
        if not seen:
            raise ValueError(f"{file} has no rows.")


TEXT_CHUNKS = {".jsonl": line_chunks, ".json": json_chunks, ".csv": csv_chunks}


def _file_chunks(
    file: str, columns: Sequence[str] | None, rows_function: RowFunction | None
) -> Iterator[Chunk]:
    if rows_function is not None:
        yield from function_chunks(file, rows_function)
    elif is_table(file):
        yield from table_chunks(file, columns)
    elif kind_of_file(file)[0] == ".parquet":
        with opened_parquet(file) as parquet:
            yield from _parquet_chunks(file, parquet, columns)
    else:
        # Other names are lines of JSON: what reads a user's files may call this.
        chunks = TEXT_CHUNKS.get(kind_of_file(file)[0], line_chunks)
        with _opened(file) as stream:
            yield from _undamaged(file, chunks(file, _buffered(stream)))


def _parquet_chunks(
    file: str, parquet: pq.ParquetFile, columns: Sequence[str] | None
) -> Iterator[Chunk]:
    there = None
    if columns is not None:
        there = [name for name in parquet.schema_arrow.names if name in columns]
    start = 0
    batches = parquet.iter_batches(batch_size=CHUNK_ROWS, columns=there)
    for chunk in _undamaged(file, (Chunk(file, 0, batch) for batch in batches)):
        yield Chunk(file, start, chunk.rows)
        start += len(chunk)


def _buffered(stream: IO[bytes]) -> Any:
    """A stream that can be peeked at, which not every file system's can."""
    return stream if hasattr(stream, "peek") else io.BufferedReader(stream)  # pyright: ignore[reportArgumentType]


def _undamaged(file: str, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks. Raises ValueError, with the row, where the file can't be read on."""
    row = 0
    while True:
        try:
            chunk = next(chunks, None)
        except (pa.ArrowException, OSError, EOFError) as error:
            if is_remote(file):
                raise OSError(f"from row {row:,} on: {error}") from error
            raise ValueError(
                f"{file} is damaged: it can't be read from row {row:,} on ({error}). Copy it again "
                "from its origin."
            ) from error
        if chunk is None:
            return
        row += len(chunk)
        yield chunk
