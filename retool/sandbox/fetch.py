"""Brings files of a work folder back by name, after the program has ended."""

from __future__ import annotations

import contextlib
import os
import stat

from .result import safe_name

MAX_FETCHED_BYTES = 16 << 20  # of all files of a call


def fetch_files(folder: int, names: list[str]) -> dict[str, bytes]:
    """Regular files of the work folder by name.

    Nothing on the way may be a link: the program made it all.
    """
    fetched: dict[str, bytes] = {}
    room = MAX_FETCHED_BYTES
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            content = _read_beneath(folder, safe_name(name).split("/"), room)
            fetched[name] = content
            room -= len(content)
    return fetched


def _read_beneath(folder: int, parts: list[str], most: int) -> bytes:
    """The content of the file at the path `parts` below the folder, opened step by step."""
    current = os.dup(folder)
    try:
        for index, part in enumerate(parts):
            kind = os.O_NONBLOCK if index == len(parts) - 1 else os.O_DIRECTORY
            step = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=current)
            os.close(current)
            current = step
        about = os.fstat(current)
        # One with a second name may lie outside, too
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1 or about.st_size > most:
            raise ValueError("not a plain file of acceptable size")
        content = b""
        while len(content) < about.st_size:
            part = os.read(current, about.st_size - len(content))
            if not part:
                break
            content += part
        return content
    finally:
        os.close(current)
