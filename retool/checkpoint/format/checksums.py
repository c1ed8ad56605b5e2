"""Checksums: of a finished file, and of one while it is written."""

from __future__ import annotations

import os
import typing
import zlib
from pathlib import Path
from typing import Any, final

import torch


def checksums_of(path: Path) -> dict[str, Any]:
    """{"size": bytes, "crc32": [one per BLOCK bytes]} of a file."""
    blocks = []
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            blocks.append(zlib.crc32(block))
            size += len(block)
    return {"size": size, "crc32": blocks}


BLOCK = 1 << 20  # bytes of a file under one of its checksums


@final
class ChecksummedFile:
    """A new file, written from beginning to end, with the CRC-32 of every BLOCK taken as the data
    goes by.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # No buffer of Python's: pieces are large, and each would be copied once more.
        self._file = path.open("wb", buffering=0)
        self._blocks: list[int] = []
        self._crc = self._size = 0

    def write(self, data: Any) -> int:
        """Write all of `data` (bytes or a buffer). OSError if the disk refuses."""
        view = memoryview(data).cast("B")
        # By block, so that one pass over memory serves both
        for start in range(-(self._size % BLOCK), len(view), BLOCK):
            piece = view[max(start, 0) : start + BLOCK]
            self._crc = zlib.crc32(piece, self._crc)
            self._size += len(piece)
            if self._size % BLOCK == 0:
                self._blocks.append(self._crc)
                self._crc = 0
            # An unbuffered write may take less than it is given.
            while piece:
                piece = piece[self._file.write(piece) :]
        return len(view)

    def flush(self) -> None:
        """Nothing to do: no data waits in this process."""

    def close(self) -> dict[str, Any]:
        """Make it survive a power cut; {"size": bytes, "crc32": [one per BLOCK bytes]}."""
        os.fsync(self._file.fileno())
        self._file.close()
        return {
            "size": self._size,
            "crc32": self._blocks + ([self._crc] if self._size % BLOCK else []),
        }

    def abandon(self) -> None:
        """Close it after an error."""
        self._file.close()


def write_archive(path: Path, content: Any) -> dict[str, Any]:
    """`torch.save` (of `bytes`: as they are) and fsync; the file's checksums. OSError where the
    disk says no: through a Python file, torch passes its errors on as they are.
    """
    file = ChecksummedFile(path)
    try:
        file.write(content) if isinstance(content, bytes) else torch.save(
            content, typing.cast(Any, file)
        )
        return file.close()
    except RuntimeError as error:
        # After a write that failed torch still ends the archive, and complains of its length instead.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        file.abandon()
