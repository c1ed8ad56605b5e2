"""From what the user typed to chunks of raw rows.

Paths, folders, globs and URLs; parquet, JSON lines, or a user's function.

Everything streams: at most one chunk of rows is in memory at a time, whatever the size of the file.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fsspec.core import url_to_fs

SUFFIXES = (".parquet", ".jsonl")
CHUNK_ROWS = 256

RowFunction = Callable[[str], Iterable[Mapping[str, Any]]]


class RowError(ValueError):
    """A row that can't be used: names file, row and, where it is one, the turn."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive raw rows of one file, from row `start`; cheap to send to a worker process.

    `rows` is an Arrow batch (parquet), a list of text lines (JSON lines) or a list of mappings (a
    user's function).
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
            elif not isinstance(raw, str):
                kind = type(raw).__name__
                where = f"{self.file}, row {index}"
                yield index, RowError(f"{where}: the row function gave a {kind}, not a dict.")
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


def _parquet_rows(
    file: str, start: int, batch: pa.RecordBatch
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """(row index, row) of a batch.

    Where it can't be converted as a whole, the rows that can't are told.
    """
    try:
        yield from enumerate(batch.to_pylist(), start)
        return
    except (UnicodeDecodeError, pa.ArrowException, RecursionError):
        pass
    for i in range(batch.num_rows):
        try:
            yield start + i, batch.slice(i, 1).to_pylist()[0]
        except (UnicodeDecodeError, pa.ArrowException, RecursionError) as error:
            yield start + i, RowError(f"{file}, row {start + i}: it can't be read: {error}.")


def resolve_files(files: str | Sequence[str], any_suffix: bool = False) -> list[str]:
    """Every data file that `files` names, in order.

    That is a path, a folder, a glob or a URL, one or a list, the list as text too.

    `any_suffix` leaves the format to a user's row function. Raises ValueError for a missing file,
    an empty folder, an unknown suffix and a file named twice.
    """
    if not isinstance(files, str):
        names = [str(entry) for entry in files]
    elif _is_list(files):
        names = [str(entry) for entry in yaml.safe_load(files)]
    else:
        names = [files]
    if not names or not all(name.strip() for name in names):
        raise ValueError(
            f"no data file is named in {files!r}: give a .parquet or .jsonl file, a folder, a glob, or a "
            "list of these."
        )
    found = [path for name in names for path in _expand(name.strip(), any_suffix)]
    for path in found:
        if not _is_utf8(path):
            told = os.fsencode(path).decode("utf-8", "backslashreplace")
            raise ValueError(
                f"the name of {told} isn't UTF-8, so nothing could tell of it: rename the file."
            )
    twice = sorted({path for path in found if found.count(path) > 1})
    if twice:
        raise ValueError(
            f"{twice[0]} is named more than once in {files!r}: its rows would be trained twice."
        )
    return found


def _is_list(files: str) -> bool:
    """Whether it is a list written as text, `[a, b]`, and not the name of a file."""
    text = files.strip()
    return text.startswith("[") and text.endswith("]") and not os.path.exists(files)


def _expand(name: str, any_suffix: bool) -> list[str]:
    fs, path = url_to_fs(os.path.expanduser(name))
    if fs.isdir(path):
        inside = sorted(
            entry for entry in fs.ls(path, detail=False) if any_suffix or entry.endswith(SUFFIXES)
        )
        if not inside:
            raise ValueError(f"the folder {name} has no {' or '.join(SUFFIXES)} file in it.")
    elif fs.exists(path):
        inside = [path]
    elif glob.has_magic(path):
        inside = sorted(str(entry) for entry in fs.glob(path))
        if not inside:
            raise ValueError(f"no file matches {name}.")
    else:
        several = f" Several files are a list: [{name}]." if "," in name else " Check the path."
        raise ValueError(f"{name} doesn't exist.{several}")
    wrong = [entry for entry in inside if not any_suffix and not entry.endswith(SUFFIXES)]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is neither {' nor '.join(SUFFIXES)}: convert it, or read it with a function of "
            "yours (data.custom_cls.path, name)."
        )
    return [str(fs.unstrip_protocol(entry)) if "://" in name else entry for entry in inside]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_identity(file: str) -> str:
    """Changes when the file changes.

    It is made of path, size and modification time, or of what the remote store says of it.
    """
    fs, path = url_to_fs(file)
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "file" in protocols:
        stat = os.stat(path)
        return f"{os.path.realpath(path)}:{stat.st_size}:{stat.st_mtime_ns}"
    return f"{file}:{fs.ukey(path)}"


def columns_of(file: str) -> list[str]:
    """The columns of a parquet file, or the fields of the first rows of a JSON-lines file.

    Raises ValueError when empty.
    """
    fs, path = url_to_fs(file)
    _refuse_empty(file, fs.size(path))
    with fs.open(path, "rb") as stream:
        if file.endswith(".parquet"):
            return list(_parquet(file, stream).schema_arrow.names)
        lines = list(islice((line for line in stream if line.strip()), CHUNK_ROWS))
    if not lines:
        raise ValueError(f"{file} has no rows.")
    rows = [_parse_line(file, i, line.decode("utf-8", "replace")) for i, line in enumerate(lines)]
    return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))


def _refuse_empty(file: str, size: int | None) -> None:
    if size == 0:
        raise ValueError(f"{file} is empty (0 bytes).")


def _parquet(file: str, stream: Any) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(stream)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} isn't a readable parquet file: {error}") from error
    if parquet.metadata.num_rows == 0:
        raise ValueError(f"{file} has no rows.")
    return parquet


def iter_chunks(
    files: Sequence[str],
    columns: Sequence[str] | None = None,
    rows_function: RowFunction | None = None,
    limit: int = -1,
) -> Iterator[Chunk]:
    """Every row of `files` in order, as chunks.

    Of a parquet file only `columns` (those it has) are read.

    `limit` keeps the first rows over all files (-1: all). Raises ValueError for a file that is
    empty or unreadable.
    """
    left = limit if limit >= 0 else None
    for file in files:
        if left == 0:
            return
        seen = 0
        for chunk in _file_chunks(file, columns, rows_function):
            part = chunk if left is None or len(chunk) <= left else chunk.head(left)
            left = None if left is None else left - len(part)
            seen += len(part)
            if len(part):
                yield part
            if left == 0:
                return
        if not seen:
            raise ValueError(f"{file} has no rows.")


def _file_chunks(
    file: str, columns: Sequence[str] | None, rows_function: RowFunction | None
) -> Iterator[Chunk]:
    if rows_function is not None:
        yield from _function_chunks(file, rows_function)
        return
    fs, path = url_to_fs(file)
    _refuse_empty(file, fs.size(path))
    with fs.open(path, "rb") as stream:
        if file.endswith(".parquet"):
            parquet = _parquet(file, stream)
            there = None
            if columns is not None:
                there = [name for name in parquet.schema_arrow.names if name in columns]
            start = 0
            batches = parquet.iter_batches(batch_size=CHUNK_ROWS, columns=there)
            while (batch := _next_batch(file, start, batches)) is not None:
                yield Chunk(file, start, batch)
                start += batch.num_rows
        else:
            start = 0
            while lines := list(islice(stream, CHUNK_ROWS)):
                texts = [line.decode("utf-8", "surrogateescape") for line in lines]
                yield Chunk(file, start, texts)
                start += len(texts)


def _next_batch(file: str, start: int, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is damaged: it can't be read from row {start:,} on ({error}). Copy it again "
            "from its origin."
        ) from error


def _function_chunks(file: str, rows_function: RowFunction) -> Iterator[Chunk]:
    start = 0
    try:
        rows = iter(rows_function(file))
        while part := list(islice(rows, CHUNK_ROWS)):
            yield Chunk(file, start, part)
            start += len(part)
    except (ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        raise ValueError(f"{file} can't be read by your function: {_told(error)}.") from error


def _told(error: BaseException) -> str:
    """What code of the user's raised, and where."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{kind}: {error.msg} ({error.filename}, line {error.lineno})"
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{kind}: {error} ({at.filename}, line {at.lineno})"


def load_function(
    path: str, name: str, signature: str = "(path) -> rows (dicts), not a Dataset class"
) -> Callable[..., Any]:
    """The function `name` of the Python file `path`.

    A class is refused: torch datasets aren't rows. `signature` is what the message asks for then.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} doesn't exist (it should hold the function {name!r}).")
    spec = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(path))[0], path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} isn't a Python file by its name: give it the suffix .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        guard = (
            " Put what a script does under if __name__ == '__main__'."
            if isinstance(error, SystemExit)
            else ""
        )
        raise ValueError(f"{path} can't be loaded: {_told(error)}.{guard}") from error
    found = getattr(module, name, None)
    if found is None:
        there = sorted(
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_")
        )
        raise ValueError(f"{path} has no {name!r}; it has {', '.join(there) or 'no function'}.")
    if isinstance(found, type) or not callable(found):
        raise ValueError(
            f"{name!r} in {path} is a {type(found).__name__}: give a function {signature}."
        )
    return cast("Callable[..., Any]", found)
