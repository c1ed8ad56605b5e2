"""Files that may hold anything: only regular ones are opened, and no more is read than such a file
can honestly have.

A named pipe would block whoever opens it, a device has no end, and a file of a gigabyte where ten
lines belong takes all memory. Errors are ValueErrors that name the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
NAME_CHARACTERS = 300


def open_regular(path: Path) -> BinaryIO:
    """Open for reading, in binary. ValueError for what is no regular file; OSError as usual."""
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(
            f"{path} is a folder, a pipe or a device where a file is expected. Move it away."
        )
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes.

    ValueError for a larger one, or one that can't be read.
    """
    try:
        with open_regular(path) as file:
            # One more than allowed tells a larger one; its size may change between a look and the read
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror or error}).") from error
    if len(data) > limit:
        raise ValueError(
            f"{path} has more than {limit} bytes, more than such a file can need: it is "
            "damaged, or another kind of file."
        )
    return data


def read_json(path: Path, limit: int) -> Any:
    """The content of a JSON file of at most `limit` bytes. ValueError names the file."""
    data = read_bytes(path, limit)
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as JSON ({shown(str(error))}).") from error


def read_lines(path: Path, limit: int) -> Iterator[bytes | None]:
    """The lines of a file with their line ends, one in memory at a time; None for each that is
    longer than `limit` bytes.
    """
    with open_regular(path) as file:
        while line := file.readline(limit + 1):
            if len(line) <= limit:
                yield line
                continue
            # The rest of it, a piece at a time, up to where the next line begins
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK_BYTES)
            yield None


def shown(name: str) -> str:
    """A text of unknown origin as messages show it: one line, no control characters, not endless."""
    line = "".join(c if c.isprintable() else "?" for c in name[: NAME_CHARACTERS + 1])
    return line if len(line) <= NAME_CHARACTERS else line[:NAME_CHARACTERS] + "…"
