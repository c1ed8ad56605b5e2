"""A program's work folder as a list of its contents, and back.

Executes inside the cell.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .variables import largest_first, megabytes


class File(NamedTuple):
    """A file, a link or a folder, by its path below the work folder."""

    name: str
    kind: str  # file, link or folder
    mode: int = 0
    content: bytes = b""  # a link's is where it leads


def lay_out(folder: str, files: Sequence[File]) -> None:
    """Make them again."""
    for file in files:
        path = os.path.join(folder, file.name)
        if file.kind == "folder":
            os.makedirs(path, exist_ok=True)
            continue
        above = os.path.dirname(path)
        os.makedirs(above, exist_ok=True)
        if file.kind == "link":
            os.symlink(file.content, os.fsencode(path))
        elif file.kind == "file":
            with open(path, "wb") as target:
                target.write(file.content)
            os.chmod(path, file.mode)


def read(folder: str, left_aside: str, room: int) -> tuple[list[File], dict[str, str]]:
    """All that lies there but the file `left_aside`; and what has no room: name → what it is. The
    largest files go first.
    """
    sizes = dict(_sizes(folder, left_aside))
    left_out: dict[str, str] = {}
    total = sum(sizes.values())
    for name in largest_first(sizes):
        if total <= room:
            break
        total -= sizes[name]
        left_out[name] = f"a file of {megabytes(sizes[name])}"
    files: list[File] = []
    for name in sizes:
        if name not in left_out:
            files += _read(folder, name)
    return files, left_out


def _sizes(folder: str, left_aside: str) -> Iterator[tuple[str, int]]:
    """Each by its name, folders before what is in them, with its bytes."""
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = os.path.join(place, name)
            inner = os.path.relpath(path, folder)
            if inner == left_aside:
                continue
            size = 0
            with contextlib.suppress(OSError):
                size = os.lstat(path).st_size
            yield inner, size


def _read(folder: str, name: str) -> list[File]:
    """It, or nothing: of what can't be read, and of pipes and the like."""
    path = os.path.join(folder, name)
    with contextlib.suppress(OSError):
        if os.path.islink(path):
            target = os.fsencode(os.readlink(path))
            return [File(name, "link", content=target)]
        if os.path.isdir(path):
            return [File(name, "folder")]
        if os.path.isfile(path):
            mode = os.stat(path).st_mode & 0o777
            with open(path, "rb") as file:
                content = file.read()
            return [File(name, "file", mode, content)]
    return []
