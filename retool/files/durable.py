"""Files of ours, written so that they last: a reader sees the old content or the new one, never a
part, and a power cut takes nothing that was said to be there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, lasting: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, in one step, when the block ends without an error.

    Until then it lies beside it under a hidden name. Not `lasting` is quicker: after a power cut
    the content may be missing.
    """
    # In the same folder: a rename is one step only within one disk
    fresh = path.with_name(f".{path.name}.tmp")
    try:
        with fresh.open("wb") as file:
            yield file
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    if lasting:
        # The rename is an entry of the folder, which a power cut may take as well
        fsync(path.parent)


def replace_text(path: Path, text: str, lasting: bool = True) -> None:
    """Replace a small file's content in one step."""
    with replacing(path, lasting) as file:
        file.write(text.encode())
