"""Rows from a function of the user's: found in its file, and called."""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

from retool.data.read.chunk import CHUNK_ROWS, Chunk, RowError, RowFunction


def function_chunks(file: str, rows_function: RowFunction) -> Iterator[Chunk]:
    """The rows that the user's function gives for `file`. Raises ValueError with what it raises."""
    start = 0
    try:
        rows = iter(rows_function(file))
        while part := list(islice(rows, CHUNK_ROWS)):
            yield Chunk(
                file, start, [_row(row, f"{file}, row {start + i}") for i, row in enumerate(part)]
            )
            start += len(part)
    except (ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        raise ValueError(f"{file} can't be read by your function: {_told(error)}.") from error


def _row(row: Any, where: str) -> Any:
    """A row that a function gave: a mapping, or a line of JSON; or the error in its place."""
    if isinstance(row, (Mapping, str)):
        return row
    return RowError(f"{where}: the row function gave a {type(row).__name__}, not a dict.")


def _told(error: BaseException) -> str:
    """What code of the user's raised, and where."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{kind}: {error.msg} ({error.filename}, line {error.lineno})"
    return f"{kind}: {error}{place_of(error)}"


def place_of(error: BaseException) -> str:
    """Where an error was raised, in brackets; "" where that isn't known."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def load_function(
    path: str, name: str, signature: str = "(path) -> rows (dicts), not a Dataset class"
) -> Callable[..., Any]:
    """The function `name` of the Python file `path`.

    A class is refused: torch datasets aren't rows. `signature` is what the message asks for then.
    """
    found = load_object(path, name)
    if isinstance(found, type) or not callable(found):
        raise ValueError(
            f"{name!r} in {path} is a {type(found).__name__}: give a function {signature}."
        )
    return cast("Callable[..., Any]", found)


def load_object(path: str, name: str) -> Any:
    """What is called `name` in the Python file `path`. ValueError where there is nothing."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} doesn't exist (it should hold {name!r}).")
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
    return found
