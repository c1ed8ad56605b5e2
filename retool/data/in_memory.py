"""Rows that a program holds in memory. They are written to a file, so that everything that works
with files works with them.

The file is named by its content, so that the same rows are the same data set in the next run, on
every rank, and on the command line.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import inspect
import json
import os
import reprlib
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from retool.data.cache import default_cache_dir
from retool.data.read.containers import plain
from retool.data.tool_schema import schema_of

TEXTUAL = (datetime.date, datetime.time, decimal.Decimal, uuid.UUID)


def files_of(
    data: Any, name: str = "rows", cache_dir: str | os.PathLike[str] | None = None
) -> tuple[str, ...]:
    """What `data.train_files` is for `data`, which a program was given.

    Names of files (a text, a path, or a list of these) stay as they are. Rows are written to
    `NAME.jsonl` in a folder below `cache_dir` (None: where tokenised data is cached): a list or any
    other iterable of dicts, a function without arguments that gives one, a `datasets.Dataset`, a
    table of pandas, pyarrow or whatever else speaks Arrow. They are never held at once.

    Raises ValueError for what isn't rows, naming the row, and where there are none.
    """
    if isinstance(data, (str, os.PathLike)):
        return (os.fspath(data),)
    if isinstance(data, (list, tuple)) and data:
        names = [entry for entry in data if isinstance(entry, (str, os.PathLike))]
        if len(names) == len(data):
            _refuse_texts(names)
            return tuple(str(os.fspath(entry)) for entry in names)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    return (str(_kept(data, folder / "rows", f"{name}.jsonl")),)


def _refuse_texts(names: list[Any]) -> None:
    """A list of questions would be looked for as files."""
    for name in names:
        if " " in str(name) and not os.path.lexists(name) and not Path(name).suffix[1:].isalnum():
            given = reprlib.repr(str(name))
            raise ValueError(
                f"{given} is a text, and a list of texts is read as names of files. "
                "Give rows: [{'prompt': text}, …]."
            )


def _kept(data: Any, folder: Path, name: str) -> Path:
    """The file that holds the rows, in a folder named by their hash."""
    content = hashlib.sha256()
    folder.mkdir(parents=True, exist_ok=True)
    # Written aside: the name is the hash of the content, which is known only at the end.
    descriptor, fresh = tempfile.mkstemp(dir=folder, prefix="writing-")
    try:
        with open(descriptor, "wb") as file:
            for index, row in enumerate(_rows(data)):
                line = _line(row, index)
                content.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if not size:
            raise ValueError("the data has no rows: nothing could be trained.")
        kept = folder / content.hexdigest()[:16] / name
        kept.parent.mkdir(exist_ok=True)
        # A file that is there stays: its time is part of the name of its token cache.
        if not kept.exists() or kept.stat().st_size != size:
            os.replace(fresh, kept)
        return kept
    finally:
        Path(fresh).unlink(missing_ok=True)


def _rows(data: Any) -> Iterator[Any]:
    """Every row of what a program may hold rows in."""
    if callable(data):
        yield from _rows(data())
    elif isinstance(data, Mapping):
        raise ValueError(_mapping_told(data))
    elif type(data).__module__.partition(".")[0] == "pandas":
        yield from _pandas_rows(data)
    elif type(data).__module__.partition(".")[0] == "datasets":
        yield from data.with_format(None)
    elif hasattr(data, "__arrow_c_stream__"):
        for batch in pa.RecordBatchReader.from_stream(data):
            yield from batch.to_pylist()
    elif isinstance(data, Iterable):
        yield from data
    else:
        raise ValueError(
            f"a {type(data).__name__} isn't rows: give a list of dicts, a table, or a function that "
            "yields dicts."
        )


def _pandas_rows(data: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data frame; what pandas holds as missing is None, as in a file."""
    if not hasattr(data, "columns"):
        raise ValueError(f"a pandas {type(data).__name__} isn't rows: give a DataFrame.")
    # pandas has NaN, NaT, NA and None for "nothing". Rows of dicts would keep three of them as
    # values.
    missing = data.isna().to_numpy()
    names = [str(column) for column in data.columns]
    for values, absent in zip(data.itertuples(index=False, name=None), missing, strict=True):
        yield {
            name: None if gone else value
            for name, value, gone in zip(names, values, absent, strict=True)
        }


def _mapping_told(data: Mapping[str, Any]) -> str:
    splits = ", ".join(map(str, data))
    if type(data).__module__.partition(".")[0] == "datasets":
        return f"the data is divided into splits: {splits}. Give one of them: data[{next(iter(data))!r}]."
    return f"a dict ({splits}) isn't rows: give a list of dicts, one a row."


def _line(row: Any, index: int) -> bytes:
    """A row as a line of JSON. Raises ValueError, naming the row, for what can't be."""
    if not isinstance(row, Mapping):
        raise ValueError(f"row {index} of the data is a {type(row).__name__}, not a dict.")
    cells = list[str]()
    for name, given in row.items():
        value = _schemas(given, index) if name == "tools" else given
        try:
            cell = json.dumps(plain(value), default=_text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"row {index} of the data: {str(name)!r} can't be kept ({error}): leave the column out, "
                "or make text of it."
            ) from error
        # Cell by cell, so that an error names the column.
        cells.append(f"{json.dumps(str(name))}: {cell}")
    return ("{" + ", ".join(cells) + "}\n").encode()


def _schemas(tools: Any, index: int) -> Any:
    """A row's tools; those that reinforcement learning takes, functions and objects, as schemas."""
    if not isinstance(tools, (list, tuple)):
        return tools
    try:
        return [
            schema_of(tool) if inspect.isfunction(tool) else getattr(tool, "schema", tool)
            for tool in tools
        ]
    except ValueError as error:
        raise ValueError(f"row {index} of the data: {error}") from error


def _text(value: Any) -> str:
    """Values that JSON lacks, and that people store as their text anyway."""
    if isinstance(value, TEXTUAL):
        return str(value)
    raise TypeError(f"it holds a {type(value).__name__}")
